"""The registered model: its versions, and which of them are the challenger, the champion and the previous champion.

An alias is on one version at most. The store moves it from one version to another in one step, so there is always a
champion once there has been one.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow.entities import LoggedModelStatus, Run

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.paths import MODEL
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.tracking.address import locate_store
from mnist_pipeline.tracking.run import DATA_TAG, DATASET_DIGEST_LENGTH, MODEL_TAG, NOTE_TAG
from mnist_pipeline.tracking.store import Store, ignore_mlflow_error, store_errors

REGISTERED_MODEL = "mnist"
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"  # models:/mnist@champion
_RECORDED_METRICS = ("test_accuracy", "test_loss", "test_calibration_error", "parameters")


@dataclass(frozen=True)
class ModelVersion:
    """A version of the registered model, and the run that trained it."""

    number: int
    run: Run = field(compare=False, repr=False)
    client: mlflow.MlflowClient = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"version {self.number}"

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric of its run."""
        return dict(self.run.data.metrics)

    @property
    def data_sha256(self) -> str:
        """The digest of the data that trained it; empty if its run has none."""
        return str(self.run.data.tags.get(DATA_TAG, ""))

    def tested_on(self, digits: Digits) -> bool:
        """Return whether its test metrics come from exactly these images."""
        inputs = self.run.inputs.dataset_inputs if self.run.inputs else []
        tested = {used.dataset.digest for used in inputs if used.tags[0].value == "test"}
        return tested == {digits.sha256()[:DATASET_DIGEST_LENGTH]}

    def download_model(self, directory: Path) -> Path:
        """Download its model file into a directory and return the file's path.

        Raises:
            UserError: the store fails, or the file is not the one that the run trained.
        """
        with store_errors():
            file = Path(self.client.download_artifacts(self.run.info.run_id, str(MODEL), str(directory)))
        if sha256(file) != self.run.data.tags.get(MODEL_TAG):
            raise UserError(f"{MODEL} of run {self.run.info.run_id} ({self}) is not the file that it trained")
        return file


class Registry:
    """The versions of the registered model in a store, and their aliases. Each move is recorded before it is made.

    If a process dies, the champion is the former one or the new one, and the same call again completes the move. A
    server has no lock and no request that moves an alias on a condition: two promotions at once may both be judged
    against the former champion. Then the last to move the alias wins; each checks before and after whether another one
    came between.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.client = store.client

    def lock(self) -> AbstractContextManager[object]:
        """Let one process at a time into a block, if the store is a database here."""
        return FileLock(f"{self.store.database}.registry.lock") if self.store.database else nullcontext()

    def find(self, alias: str) -> ModelVersion | None:
        """Return the version with an alias, if there is one."""
        found = None
        with ignore_mlflow_error("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            found = self.client.get_model_version_by_alias(REGISTERED_MODEL, alias)
        return ModelVersion(int(found.version), self.client.get_run(found.run_id or ""), self.client) if found else None

    def register(self, model: Path) -> ModelVersion:
        """Return the version of this model file; if there is none, create it from the file's newest run.

        Raises:
            UserError: the store has no tested run of the model file.
        """
        found = self.store.search_runs(f"tags.{MODEL_TAG} = '{sha256(model)}'")
        if not (runs := {run.info.run_id: run for run in found if "test_accuracy" in run.data.metrics}):
            raise UserError(f"MLflow has no run of {model} and its test: `make backfill` adds it")
        if not self._versions_of(runs):
            self._create_version(next(iter(runs.values())))
        return min(self._versions_of(runs), key=lambda version: version.number)  # the same for two processes at once

    def _versions_of(self, runs: Mapping[str, Run]) -> list[ModelVersion]:
        found = self.client.search_model_versions(f"name = '{REGISTERED_MODEL}'")
        return [
            ModelVersion(int(one.version), run, self.client) for one in found if (run := runs.get(one.run_id or ""))
        ]

    def _create_version(self, run: Run) -> None:
        of_run = f"source_run_id = '{run.info.run_id}'"
        newest_first = [{"field_name": "creation_timestamp", "ascending": False}]
        found = self.client.search_logged_models([run.info.experiment_id], of_run, order_by=newest_first)
        models = [model.model_id for model in found if model.status == LoggedModelStatus.READY]
        if not models:
            raise UserError(f"run {run.info.run_id} has lost its model: delete it, and `make backfill` makes another")
        with ignore_mlflow_error("RESOURCE_ALREADY_EXISTS"):
            self.client.create_registered_model(REGISTERED_MODEL)
        self.client.create_model_version(
            REGISTERED_MODEL,
            f"models:/{models[0]}",  # an interrupted training may have left others
            run.info.run_id,
            description=run.data.tags.get(NOTE_TAG),
            model_id=models[0],
        )

    def challenge(self, version: ModelVersion, move: Mapping[str, str]) -> None:
        """Make a version the challenger."""
        self._record(version, move, became=CHALLENGER)
        self._set_alias(CHALLENGER, version)

    def promote(self, version: ModelVersion, champion: ModelVersion | None, move: Mapping[str, str]) -> None:
        """Make a version the champion, and the champion that it was judged against the previous one.

        Raises:
            UserError: another promotion came between.
        """
        self._expect_champion(champion, version)
        self._record(version, move, became=CHAMPION, instead_of=str(champion or "none"))
        if champion:
            self._record(champion, move, became=PREVIOUS, successor=str(version))
            self._set_alias(PREVIOUS, champion)
        self._set_alias(CHAMPION, version)
        self.drop_alias(CHALLENGER, version)
        self._expect_champion(version)

    def roll_back(self, champion: ModelVersion | None, previous: ModelVersion, move: Mapping[str, str]) -> None:
        """Make the previous champion the champion again, and take the alias from the present one."""
        if champion != previous:  # a promotion or a rollback that died may have left both aliases on one version
            self._record(previous, move, became=CHAMPION, instead_of=str(champion or "none"))
            if champion:
                self._record(champion, move, became="withdrawn", successor=str(previous))
            self._set_alias(CHAMPION, previous)
        self.drop_alias(PREVIOUS, previous)

    def _expect_champion(self, *versions: ModelVersion | None) -> None:
        if (found := self.find(CHAMPION)) not in versions:
            raise UserError(
                f"another promotion came between, and {found} is the champion: promote again to be judged by it"
            )

    def _record(self, version: ModelVersion, move: Mapping[str, str], **role: str) -> None:
        """Keep a move as a tag of the version, under the time: MLflow's pages list tags by name."""
        metrics = {name: value for name, value in version.metrics.items() if name in _RECORDED_METRICS}
        when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f UTC")
        value = json.dumps({**role, **move, "metrics": metrics}, ensure_ascii=False)
        self.client.set_model_version_tag(REGISTERED_MODEL, str(version.number), when, value)

    def _set_alias(self, alias: str, version: ModelVersion) -> None:
        self.client.set_registered_model_alias(REGISTERED_MODEL, alias, str(version.number))

    def drop_alias(self, alias: str, version: ModelVersion) -> None:
        """Take an alias from a version, if that version has it."""
        if self.find(alias) == version:
            self.client.delete_registered_model_alias(REGISTERED_MODEL, alias)


def find_champion() -> ModelVersion | None:
    """Return the champion, if there is one. If there is no store, create none.

    Raises:
        UserError: the store fails.
    """
    _, database = locate_store(Path())
    if database and not database.exists():
        return None
    with store_errors():
        return Registry(Store(patient=True)).find(CHAMPION)


def fetch_champion(directory: Path) -> tuple[Path, str] | None:
    """Download the champion's model file into a directory; return its path and the version's name.

    Without a champion return None. If the store fails, or the file is not the one that its run trained, print one line
    of warning and return None.
    """
    try:
        if (champion := find_champion()) is None:
            return None
        return champion.download_model(directory), f"models:/{REGISTERED_MODEL}@{CHAMPION}, {champion}"
    except UserError as error:
        print(f"warning: {error}, so the champion is not used", file=sys.stderr, flush=True)
        return None
