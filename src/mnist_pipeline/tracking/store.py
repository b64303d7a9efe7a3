"""The tracking store: its runs, and what happens when it fails."""

import logging
import os
import platform
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow.entities import Run
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.params import flatten
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.tracking.provenance import Provenance, title
from mnist_pipeline.tracking.run import DATA_TAG, MODEL_TAG, TrackedRun

URI = "MLFLOW_TRACKING_URI"
DATABASE = Path("mlflow.db")
EXPERIMENT = "mnist"
WORKSPACE_TAG = "workspace"
EXPERIMENT_TAG = "dvc_experiment"
PARENT = "MNIST_PARENT_RUN"  # in the environment: the id of the run that a training is a part of


class Store:
    """The tracking store: the runs of this project in it."""

    def __init__(self) -> None:
        """Connect, and make the experiment if it is not there.

        Paths are absolute: DVC runs experiments in a temporary copy and names the original `DVC_ROOT`.
        """
        _configure_mlflow()
        root = Path(os.environ.get("DVC_ROOT", ".")).resolve()
        self.database = root / DATABASE
        os.environ[URI] = os.environ.get(URI) or f"sqlite:///{self.database}"
        self.embedded = os.environ[URI] == f"sqlite:///{self.database}"
        # Two processes that make the database's tables at once break each other (mlflow#6490).
        with FileLock(f"{self.database}.lock", timeout=20) if self.embedded else nullcontext():
            if self.embedded:
                prepare(self.database)
            self.client = mlflow.MlflowClient()
            self.experiment_id = self.experiment((root / "mlartifacts").as_uri() if self.embedded else None)
        # A training belongs to the experiment of DVC that it runs in, if to one, and to the place.
        self.name = os.environ.get("DVC_EXP_NAME")
        self.origin = {
            EXPERIMENT_TAG: self.name,
            WORKSPACE_TAG: f"{platform.node()}:{root}",
            MLFLOW_PARENT_RUN_ID: os.environ.get(PARENT),
        }

    def experiment(self, artifacts: str | None) -> str:
        """Return the id of MLflow's experiment, which is made, with its artifacts at a URI, where it is not there."""
        if self.client.get_experiment_by_name(EXPERIMENT) is None:
            try:
                self.client.create_experiment(EXPERIMENT, artifacts)
            except mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                    raise
        return str(mlflow.set_experiment(EXPERIMENT).experiment_id)

    def search(self, condition: str) -> list[Run]:
        """Return the runs that meet a condition in MLflow's search syntax, newest first."""
        return list(self.client.search_runs([self.experiment_id], condition, order_by=["attributes.start_time DESC"]))

    def run_of(self, model: Path) -> TrackedRun | None:
        """Return the newest run that trained the model in a file, under `dvc exp run` that experiment's alone.

        The file's digest finds it, so no output holds a run's id.
        """
        runs = self.search(f"tags.{MODEL_TAG} = '{sha256(model)}'")
        ids = [run.info.run_id for run in runs if self.name in (None, run.data.tags.get(EXPERIMENT_TAG))]
        return TrackedRun(self.client, ids[0]) if ids else None

    def unfinished_run_of(self, provenance: Provenance) -> TrackedRun | None:
        """Return the newest run of a training from here that has not got its model, because the store failed."""
        for run in self.search(f"tags.fingerprint = '{provenance.fingerprint}'"):
            tags = run.data.tags
            if MODEL_TAG not in tags and all(tags.get(name) == value for name, value in self.origin.items()):
                return TrackedRun(self.client, run.info.run_id)
        return None

    def reopen(self, run_id: str | None) -> TrackedRun | None:
        """Return an interrupted run by its id, running again, where the store still holds it."""
        try:
            found = run_id and self.client.get_run(run_id)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if not found or found.info.lifecycle_stage != "active":
            return None
        self.client.update_run(found.info.run_id, "RUNNING")
        return TrackedRun(self.client, found.info.run_id)

    def begin_run(self, provenance: Provenance, tags: Mapping[str, str]) -> TrackedRun:
        """Begin the run of a training."""
        known = {"stage": provenance.stage, DATA_TAG: provenance.data_sha256}
        known |= {name: value for name, value in self.origin.items() if value}
        every = resolve_tags({**known, **provenance.tags(), **tags})
        created = self.client.create_run(self.experiment_id, tags=every, run_name=self.name or title())
        return TrackedRun(self.client, created.info.run_id)

    def add_to_run_of(self, model: Path, provenance: Provenance, datasets: Mapping[str, Digits] | None = None) -> None:
        """`TrackedRun.add` to the run that trained the model in a file; say so where there is none."""
        if found := self.run_of(model):
            found.add(provenance, datasets)
        else:
            print(f"MLflow has no run of {model} yet: the report stage or `make backfill` adds it")

    def touch(self) -> None:
        """Leave a database of our own newer than `dvc.lock`: `make repro` need not look for what it lacks again."""
        if self.embedded:
            self.database.touch()


def finished_runs(condition: str) -> list[dict[str, Any]]:
    """Return the finished runs that meet a condition in MLflow's search syntax, oldest first.

    Each is flat, under `params.…` and `metrics.…`; of a metric, the last value.
    """
    runs = Store().search(f"attributes.status = 'FINISHED' and {condition}")
    return [flatten({"params": run.data.params, "metrics": run.data.metrics}) for run in reversed(runs)]


def _configure_mlflow() -> None:
    """Silence MLflow, and bound how long it waits for a server; what the user has set stays."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # By default MLflow waits minutes for a server that does not answer. These settings give a request up after 13
    # seconds. A stage may send one more to close what it began, so it loses less than 30.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "6")
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    mlflow.telemetry.set_telemetry_client()  # type: ignore[no-untyped-call]  # the import has set one already
    for name in ("mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `continue_untracked` says all there is to say


class StoreError(UserError):
    """The store failed."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Say in one line why the store fails in the block.

    Raises:
        StoreError: it does.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow lets through what SQLAlchemy, requests, Alembic and the disk raise
        raise StoreError(f"MLflow at {address()} failed ({explain(error)})") from None


@contextmanager
def continue_untracked(untracked: str) -> Iterator[None]:
    """Say in one line that something is not tracked, and why, where the store fails in the block.

    Raises:
        UserError: it fails and `MNIST_TRACKING` is `required`.
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


def address() -> str:
    """Return the store's address without the password that it may have."""
    return re.sub(r"//[^/]*@", "//", os.environ.get(URI, str(DATABASE)))


def explain(error: Exception) -> str:
    """Say in a phrase why the store failed."""
    text = str(error).strip() or type(error).__name__
    if re.search(r"database schema|Can't locate revision", text):
        return (
            f"the database's schema is not that of MLflow {version('mlflow')}: if an older one made it, copy it and "
            f"`mlflow db upgrade {address()}`; if a newer one, install that"
        )
    if "file is not a database" in text:
        return f"{address()} is no SQLite database: move it away, and a new one is made"
    if cause := re.search(r"Caused by (.*)\)", text):  # of a request that was given up: what the last attempt met
        text = re.sub(r"<[^>]*>, |HTTP\w+\([^)]*\): |.*', \w+\((\d+, )?", "", cause[1])
        return re.sub(r"^(\w+\()?['\"]|['\"]\)*$", "", text)
    return text.splitlines()[0].split(". ")[0]


def prepare(database: Path) -> None:
    """Make MLflow's database where there is none, whole or not at all: it does not go on with tables half made.

    Raises:
        sqlite3.Error: the file that is there is no SQLite database, or cannot be written; MLflow would try for minutes.
    """
    if not database.exists() or database.stat().st_size == 0:
        new = database.with_name(f"{database.name}.new")
        try:
            remove(new)  # what a process that was killed has left
            mlflow.MlflowClient(f"sqlite:///{new}").search_experiments()
            new.replace(database)
        finally:
            remove(new)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def remove(database: Path) -> None:
    """Remove a database and its journal."""
    for file in database.parent.glob(f"{database.name}*"):
        file.unlink()
