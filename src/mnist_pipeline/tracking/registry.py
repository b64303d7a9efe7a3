"""The registered model: its versions, and which of them are the challenger, the champion and the previous champion.

No stage imports this. An alias is on one version at most, and the store moves it in one step: from one version to
another, there is no moment without it.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from mnist_pipeline.tracking.run import DATA_TAG, DIGEST_LENGTH, MODEL_TAG, NOTE_TAG
from mnist_pipeline.tracking.store import DATABASE, URI, Store, store_errors

REGISTERED = "mnist"
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"  # models:/mnist@champion
RECORDED = ("test_accuracy", "test_loss", "test_calibration_error", "parameters")  # metrics, with each move


@dataclass(frozen=True)
class Version:
    """A version of the registered model, and the run that trained it."""

    number: int
    run: Run = field(compare=False, repr=False)
    client: mlflow.MlflowClient = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"version {self.number}"

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of each metric of its run."""
        return dict(self.run.data.metrics)

    @property
    def data_sha256(self) -> str:
        """The digest of the data that trained it, empty where its run does not say."""
        return str(self.run.data.tags.get(DATA_TAG, ""))

    def tested_on(self, digits: Digits) -> bool:
        """Say whether its test metrics are of these images, and of no others."""
        inputs = self.run.inputs.dataset_inputs if self.run.inputs else []
        tested = {used.dataset.digest for used in inputs if used.tags[0].value == "test"}
        return tested == {digits.sha256()[:DIGEST_LENGTH]}

    def download(self, directory: Path) -> Path:
        """Bring its model file into a directory.

        Raises:
            UserError: it is not the file that the run trained.
        """
        with store_errors():
            file = Path(self.client.download_artifacts(self.run.info.run_id, str(MODEL), str(directory)))
        if sha256(file) != self.run.data.tags.get(MODEL_TAG):
            raise UserError(f"{MODEL} of run {self.run.info.run_id} ({self}) is not the file that it trained")
        return file


class Registry:
    """The versions of the registered model in a store, and the moves of their aliases, each recorded before it is made.

    A process that dies leaves the champion of before or the new one, and the same call again does the rest. On a server
    there is no lock, nor a request that moves an alias on a condition: two promotions at once may both be judged by the
    former champion. Then the last to move the alias wins, and each looks before and after whether another came between.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.client = store.client

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time into the block, where the store is the database of our own."""
        with FileLock(f"{self.store.database}.registry.lock") if self.store.embedded else nullcontext():
            yield

    def find(self, alias: str) -> Version | None:
        """Return the version that bears an alias, if one does."""
        try:
            found = self.client.get_model_version_by_alias(REGISTERED, alias)
        except mlflow.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
                raise
            return None
        return Version(int(found.version), self.client.get_run(found.run_id or ""), self.client)

    def register(self, model: Path) -> Version:
        """Return the version of the model in a file; its newest run becomes one where none of its runs is.

        Raises:
            UserError: the store has no run of the model, or none with its test.
        """
        found = self.store.search(f"tags.{MODEL_TAG} = '{sha256(model)}'")
        if not (runs := {run.info.run_id: run for run in found if "test_accuracy" in run.data.metrics}):
            raise UserError(f"MLflow has no run of {model} and its test: `make backfill` adds it")
        if not self.versions(runs):
            self.add_version(next(iter(runs.values())))
        return min(self.versions(runs), key=lambda version: version.number)  # the same for two that were at it at once

    def versions(self, runs: Mapping[str, Run]) -> list[Version]:
        """Return the versions of some runs, given by their ids."""
        found = self.client.search_model_versions(f"name = '{REGISTERED}'")
        return [Version(int(one.version), run, self.client) for one in found if (run := runs.get(one.run_id or ""))]

    def add_version(self, run: Run) -> None:
        """Make a run's model a version of the registered model, which is made where it is not there.

        Raises:
            UserError: the run has no model, though it has the digest of one.
        """
        where, newest = f"source_run_id = '{run.info.run_id}'", {"field_name": "creation_timestamp", "ascending": False}
        found = self.client.search_logged_models([run.info.experiment_id], where, order_by=[newest])
        models = [model.model_id for model in found if model.status == LoggedModelStatus.READY]
        if not models:
            raise UserError(f"run {run.info.run_id} has lost its model: delete it, and `make backfill` makes another")
        try:
            self.client.create_registered_model(REGISTERED)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self.client.create_model_version(
            REGISTERED,
            f"models:/{models[0]}",  # an interrupted training may have left others
            run.info.run_id,
            description=run.data.tags.get(NOTE_TAG),
            model_id=models[0],
        )

    def challenge(self, version: Version, move: Mapping[str, str]) -> None:
        """Make a version the challenger."""
        self.record(version, move, became=CHALLENGER)
        self.set_alias(CHALLENGER, version)

    def promote(self, version: Version, champion: Version | None, move: Mapping[str, str]) -> None:
        """Make a version the champion, and the champion that it was judged against the previous one.

        Raises:
            UserError: another promotion came between.
        """
        self.expect(champion, version)
        self.record(version, move, became=CHAMPION, instead_of=str(champion or "none"))
        if champion:
            self.record(champion, move, became=PREVIOUS, successor=str(version))
            self.set_alias(PREVIOUS, champion)
        self.set_alias(CHAMPION, version)
        self.drop_alias(CHALLENGER, version)
        self.expect(version)

    def expect(self, *versions: Version | None) -> None:
        """Check that the champion is one of these.

        Raises:
            UserError: another promotion came between.
        """
        if (found := self.find(CHAMPION)) not in versions:
            raise UserError(
                f"another promotion came between, and {found} is the champion: promote again to be judged by it"
            )

    def roll_back(self, champion: Version | None, previous: Version, move: Mapping[str, str]) -> None:
        """Make the previous champion the champion again, and the champion nothing."""
        if champion != previous:  # a promotion or a rollback that died may have left both aliases on one version
            self.record(previous, move, became=CHAMPION, instead_of=str(champion or "none"))
            if champion:
                self.record(champion, move, became="withdrawn", successor=str(previous))
            self.set_alias(CHAMPION, previous)
        self.drop_alias(PREVIOUS, previous)

    def record(self, version: Version, move: Mapping[str, str], **role: str) -> None:
        """Keep what a version becomes, when and by which move, as a tag of it: the interface lists them by time."""
        metrics = {name: value for name, value in version.metrics.items() if name in RECORDED}
        when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f UTC")
        value = json.dumps({**role, **move, "metrics": metrics}, ensure_ascii=False)
        self.client.set_model_version_tag(REGISTERED, str(version.number), when, value)

    def set_alias(self, alias: str, version: Version) -> None:
        """Move an alias to a version."""
        self.client.set_registered_model_alias(REGISTERED, alias, str(version.number))

    def drop_alias(self, alias: str, version: Version) -> None:
        """Take an alias from a version, if it bears it."""
        if self.find(alias) == version:
            self.client.delete_registered_model_alias(REGISTERED, alias)


def find_champion() -> Version | None:
    """Return the champion, if there is one; where there is no store, none is made.

    Raises:
        UserError: the store fails.
    """
    if URI not in os.environ and not DATABASE.exists():
        return None
    with store_errors():
        return Registry(Store()).find(CHAMPION)


def fetch_champion(directory: Path) -> tuple[Path, str] | None:
    """Bring the champion's model file into a directory; return it and the version's name.

    Return None where there is no champion. A store that fails, and a file that is not the one its run trained, are told
    in one line.
    """
    try:
        if (champion := find_champion()) is None:
            return None
        return champion.download(directory), f"models:/{REGISTERED}@{CHAMPION}, {champion}"
    except UserError as error:
        print(f"warning: {error}, so the champion is not used", file=sys.stderr, flush=True)
        return None
