"""The tracking store: its runs, and what happens when it fails."""

import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlflow
from filelock import FileLock
from mlflow.entities import Run
from mlflow.store.db import utils as database_utils
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.params import flatten
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.tracking.address import TRACKING_URI, hide_secrets, locate_store, store_address
from mnist_pipeline.tracking.client import Client, Deadline
from mnist_pipeline.tracking.database import (
    ARTIFACTS,
    EXPERIMENT,
    WORKSPACE_TAG,
    check_place,
    move_artifacts,
    prepare_database,
)
from mnist_pipeline.tracking.git import commit_tags, run_title
from mnist_pipeline.tracking.provenance import Provenance
from mnist_pipeline.tracking.run import DATA_TAG, FINGERPRINT_TAG, MODEL_TAG, TrackedRun

PARENT_RUN = "MNIST_PARENT_RUN"  # environment variable: the id of the run that a training belongs to
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages show metrics, not traces
_DVC_EXPERIMENT_TAG = "dvc_experiment"


class Store:
    """The tracking store and this project's runs in it.

    A stage spends 20 seconds at most on all its calls together. A patient caller, a command whose purpose it is to call
    the store, spends as long on each.
    """

    def __init__(self, patient: bool = False) -> None:
        """Connect, and create the experiment unless it exists.

        Paths are absolute: DVC runs experiments in a temporary copy and sets `DVC_ROOT` to the original.
        """
        configure_mlflow()
        root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
        os.environ[TRACKING_URI], self.database = locate_store(root)
        if self.database:
            check_place(self.database)
        deadline = Deadline(patient)
        # Two processes that create the database's tables at once break each other (mlflow#6490).
        with FileLock(f"{self.database}.lock", timeout=deadline.seconds) if self.database else nullcontext():
            if self.database:
                prepare_database(self.database)
            self.client = cast("mlflow.MlflowClient", Client(deadline))
            workspace = f"{platform.node()}:{root}"
            if self.database:
                move_artifacts(self.database, workspace)
            self.experiment_id = self._find_experiment()
        self.dvc_experiment = os.environ.get("DVC_EXP_NAME")
        self._origin = {
            _DVC_EXPERIMENT_TAG: self.dvc_experiment,
            WORKSPACE_TAG: workspace,
            MLFLOW_PARENT_RUN_ID: os.environ.get(PARENT_RUN),
        }

    def _find_experiment(self) -> str:
        """Return the experiment's id; create it if it is absent.

        Raises:
            RuntimeError: it was deleted. MLflow keeps it and its name, and logs nothing to it.
        """
        if (found := self.client.get_experiment_by_name(EXPERIMENT)) is None:
            with ignore_mlflow_error("RESOURCE_ALREADY_EXISTS"):  # another process was faster
                artifacts = (self.database.parent / ARTIFACTS).as_uri() if self.database else None
                self.client.create_experiment(EXPERIMENT, artifacts, _KIND)
            found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is None or found.lifecycle_stage != "active":
            restore = f"mlflow experiments restore --experiment-id {found and found.experiment_id}"
            raise RuntimeError(f"the experiment {EXPERIMENT} was deleted: `{restore}` brings it back")
        return str(found.experiment_id)

    def search_runs(self, condition: str) -> list[Run]:
        """Return the runs that meet a condition in MLflow's search syntax, newest first."""
        return list(self.client.search_runs([self.experiment_id], condition, order_by=["attributes.start_time DESC"]))

    def run_of(self, model: Path) -> TrackedRun | None:
        """Return the newest run that trained this model file; in an experiment of DVC, only a run of that experiment.

        The file's digest identifies the run, so no output needs to hold the run's id.
        """
        runs = self.search_runs(f"tags.{MODEL_TAG} = '{sha256(model)}'")
        ids = [run.info.run_id for run in runs if self.dvc_experiment in (None, run.data.tags.get(_DVC_EXPERIMENT_TAG))]
        return TrackedRun(self.client, ids[0]) if ids else None

    def unfinished_run_of(self, provenance: Provenance) -> TrackedRun | None:
        """Return the newest run of this training, begun in this workspace, that lacks its model.

        The training was killed, or the store failed.
        """
        for run in self.search_runs(f"tags.{FINGERPRINT_TAG} = '{provenance.fingerprint}'"):
            if MODEL_TAG not in run.data.tags and self._is_from_here(run):
                return TrackedRun(self.client, run.info.run_id)
        return None

    def close_dead_runs(self) -> None:
        """Close the runs that trainings in this workspace left open when they were killed: one trains at a time."""
        for run in self.search_runs("attributes.status = 'RUNNING'"):
            if self._is_from_here(run):
                TrackedRun(self.client, run.info.run_id).close("FINISHED" if MODEL_TAG in run.data.tags else "KILLED")

    def _is_from_here(self, run: Run) -> bool:
        return all(run.data.tags.get(name) == value for name, value in self._origin.items())

    def reopen_run(self, run_id: str | None) -> TrackedRun | None:
        """Set an interrupted run to RUNNING and return it; None if the store no longer has it."""
        if not run_id or not self.search_runs(f"attributes.run_id = '{run_id}'"):
            return None
        self.client.update_run(run_id, "RUNNING")
        return TrackedRun(self.client, run_id)

    def begin_run(self, provenance: Provenance) -> TrackedRun:
        """Begin the run of a training."""
        origin = {name: value for name, value in self._origin.items() if value}
        known = {"stage": provenance.stage, DATA_TAG: provenance.data_sha256, FINGERPRINT_TAG: provenance.fingerprint}
        return self.create_run(self.dvc_experiment or run_title(), known | origin | commit_tags())

    def create_run(self, name: str, tags: Mapping[str, str]) -> TrackedRun:
        """Create a run with these tags and those that MLflow adds."""
        created = self.client.create_run(self.experiment_id, tags=resolve_tags(dict(tags)), run_name=name)
        return TrackedRun(self.client, created.info.run_id)

    def add_to_run_of(self, model: Path, provenance: Provenance, datasets: Mapping[str, Digits] | None = None) -> None:
        """Add a stage to the run that trained this model file (`TrackedRun.add_stage`), or print that there is none."""
        if found := self.run_of(model):
            found.add_stage(provenance, datasets)
        else:
            print(f"MLflow has no run of {model} yet: the report stage or `make backfill` adds it")


def finished_runs(condition: str) -> list[dict[str, Any]]:
    """Return the finished runs that meet a condition in MLflow's search syntax, oldest first.

    Each is flat, with keys `params.…` and `metrics.…`; a metric has its last value.

    Raises:
        StoreError: the store failed.
    """
    with store_errors():
        runs = Store().search_runs(f"attributes.status = 'FINISHED' and {condition}")
    return [flatten({"params": run.data.params, "metrics": run.data.metrics}) for run in reversed(runs)]


def configure_mlflow() -> None:
    """Silence MLflow and limit how long it waits for a server; settings of the user stay."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # By default MLflow tries for minutes. With these settings it gives up before `Deadline` does, and knows the reason:
    # after 13 seconds if a server does not answer, at once if a database cannot be opened.
    database_utils.MAX_RETRY_COUNT = 1
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "6")
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    for name in ("mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `continue_untracked` reports failures in one line


@contextmanager
def ignore_mlflow_error(*codes: str) -> Iterator[None]:
    """Ignore MLflow's errors with these codes in the block."""
    try:
        yield
    except mlflow.MlflowException as error:
        if error.error_code not in codes:
            raise


class StoreError(UserError):
    """The store failed."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn any failure of the store in the block into one line.

    Raises:
        StoreError: the store failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow passes on errors of SQLAlchemy, requests, Alembic and the disk
        raise StoreError(f"MLflow at {store_address()} failed ({_explain(error)})") from None


@contextmanager
def continue_untracked(untracked: str) -> Iterator[None]:
    """Go on after a failure of the store in the block, with a warning that says what is not tracked and why.

    Raises:
        UserError: the store failed and `MNIST_TRACKING` is `required`.
    """
    choices = ("optional", "required")
    if (choice := os.environ.get("MNIST_TRACKING", choices[0])) not in choices:
        raise UserError(f"MNIST_TRACKING must be {' or '.join(choices)}, and is {choice!r}")
    try:
        with store_errors():
            yield
    except StoreError as error:
        message = f"{error}, so {untracked} is not tracked"
        if choice == "required":
            raise UserError(f"{message}, and MNIST_TRACKING is required") from None
        print(f"warning: {message}: `make backfill` adds it when MLflow works again", file=sys.stderr, flush=True)


def _explain(error: Exception) -> str:
    """Say in one phrase why the store failed, and what to do about it if we know."""
    text = hide_secrets(str(error).strip()) or type(error).__name__
    if re.search(r"database schema|Can't locate revision", text):
        return (
            f"the database's schema is not that of MLflow {version('mlflow')}: if an older one made it, copy it and "
            f"`mlflow db upgrade {store_address()}`; if a newer one, install that"
        )
    if "file is not a database" in text:
        return f"{store_address()} is no SQLite database: move it away, and a new one is made"
    if cause := re.search(r"Caused by (.*)\)", text):  # MLflow gave up: why its last attempt failed
        text = re.sub(r"<[^>]*>, |HTTP\w+\([^)]*\): |.*', \w+\((\d+, )?", "", cause[1])
        return re.sub(r"^(\w+\()?['\"]|['\"]\)*$", "", text)
    return text.splitlines()[0].split(". ")[0]
