"""MLflow: one run for each training, to which later stages add what they find. No other module imports it.

The store is the server that `MLFLOW_TRACKING_URI` names, else `mlflow.db` at the root of the repository. A store that
fails costs no training: the stage says in one line what is not tracked and goes on, and `make backfill` adds it later.
With `MNIST_TRACKING=required` the stage fails instead.
"""

import json
import logging
import os
import platform
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor, nn

from mnist_pipeline.data import Digits
from mnist_pipeline.errors import UserError
from mnist_pipeline.files import read_text, sha256
from mnist_pipeline.model import count_parameters
from mnist_pipeline.params import flatten
from mnist_pipeline.paths import MODEL, RAW
from mnist_pipeline.provenance import Provenance, environment, title, uncommitted
from mnist_pipeline.training import EpochResult, Training

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# By default MLflow waits minutes for a server that does not answer. So a request is given up after 13 seconds, and a
# stage, which may send one more to close what it began, loses less than 30.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "6")
os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")

import mlflow  # reads the environment when it is imported
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # of a failure, `tolerant` says all there is to say
logging.getLogger("urllib3").setLevel(logging.CRITICAL)

URI = "MLFLOW_TRACKING_URI"
DATABASE = Path("mlflow.db")
EXPERIMENT = "mnist"
REGISTERED, CHAMPION = "mnist", "champion"  # models:/mnist@champion
WORKSPACE_TAG = "workspace"
EXPERIMENT_TAG = "dvc_experiment"
MODEL_TAG = "model_sha256"  # a run that has it holds all of its training
BACKFILLED_TAG = "backfilled"
PARENT = "MNIST_PARENT_RUN"  # in the environment: the id of the run that a training is a part of
NOTE_TAG = "mlflow.note.content"  # the interface shows it as the run's description
DIGEST_LENGTH = 36  # characters, MLflow's limit for the digest of a dataset


class TrackedRun:
    """A run in the store, and what can be added to it."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str) -> None:
        self.client = client
        self.id = run_id

    def log(
        self,
        metrics: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        """Log it all in one request."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id,
            [Metric(name, float(value), now, step) for name, value in (metrics or {}).items()],
            [Param(name, str(value)) for name, value in (params or {}).items()],
            [RunTag(name, str(value)) for name, value in (tags or {}).items()],
        )

    def log_start(self, provenance: Provenance, datasets: Mapping[str, Digits], model: nn.Module) -> None:
        """Log what is known at the start of a training; twice is as good as once."""
        had = self.client.get_run(self.id).data.metrics
        size = {"parameters": count_parameters(model)}
        self.log({} if size.keys() <= had.keys() else size, provenance.params)
        self.log_datasets(datasets)
        self.log_provenance(provenance)

    def log_epoch(self, row: Mapping[str, float], **others: float) -> None:
        """Log the numbers of an epoch, under its number."""
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        self.log(metrics | others, step=int(row["epoch"]))

    def log_history(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the epochs that the run does not have."""
        had = {point.step for point in self.client.get_metric_history(self.id, "train_loss")}
        for row in rows:
            if int(row["epoch"]) not in had:
                self.log_epoch(row)

    def log_datasets(self, datasets: Mapping[str, Digits]) -> None:
        """Log the digests of the images that a stage used, under what it used them for."""
        inputs = []
        for use, digits in datasets.items():
            digest = digits.sha256()
            described = Dataset(
                name=f"mnist-{use}",  # MLflow keeps one data set of a name and digest
                digest=digest[:DIGEST_LENGTH],
                source_type="local",
                source=json.dumps({"uri": str(RAW.parent)}),
                profile=json.dumps({"num_rows": len(digits), "per_class": digits.per_class(), "sha256": digest}),
            )
            inputs.append(DatasetInput(described, [InputTag("mlflow.data.context", use)]))
        self.client.log_inputs(self.id, inputs)

    def log_model(self, model: nn.Module, path: Path, example: Tensor) -> None:
        """Log the model with its signature and, at last, the digest of its file, by which later stages find the run.

        `example` is a batch of at least two normalised images: exported from one alone, the model would take no more.
        """
        model = model.cpu().eval()
        example = example.cpu()
        mlflow.models.Model.log(
            artifact_path=None,
            name="model",
            run_id=self.id,
            flavor=mlflow.pytorch,
            pytorch_model=model,
            input_example=example.numpy(),
            signature=mlflow.models.infer_signature(example.numpy(), model(example).detach().numpy()),
            serialization_format="pt2",  # torch.export's format: weights and program without pickle
            pip_requirements=[f"torch=={version('torch')}"],
        )
        self.log(tags={MODEL_TAG: sha256(path)})

    def log_provenance(self, provenance: Provenance) -> None:
        """Keep the digest of each input, and what was not committed, in files that the interface displays."""
        self.client.log_dict(self.id, asdict(provenance), f"provenance/{provenance.stage}.json")
        if patch := uncommitted():
            self.client.log_text(self.id, patch, f"provenance/{provenance.stage}.patch")

    def log_outputs(self, provenance: Provenance) -> None:
        """Keep what the stage wrote, under the paths that it has in the repository."""
        for output in map(Path, provenance.outputs):
            if output.is_dir():
                self.client.log_artifacts(self.id, str(output), str(output))
            else:
                self.client.log_artifact(self.id, str(output), str(output.parent))

    def add(
        self, provenance: Provenance, datasets: Mapping[str, Digits] | None = None, backfilled: bool = False
    ) -> None:
        """Add what a later stage read and wrote and, at last, its tags, which say that all of it is there.

        MLflow does not change a param: where a rerun has another value than the run, that stands among the tags.
        """
        had = self.client.get_run(self.id).data
        params = {name: value for name, value in provenance.params.items() if name not in had.params}
        changed = {
            name: value
            for name, value in provenance.params.items()
            if name in had.tags or had.params.get(name, str(value)) != str(value)
        }
        metrics = flatten({k: v for path in provenance.metrics for k, v in json.loads(read_text(Path(path))).items()})
        self.log(metrics, params, changed | ({NOTE_TAG: describe(metrics)} if metrics else {}))
        self.log_datasets(datasets or {})
        self.log_outputs(provenance)
        self.log_provenance(provenance)
        tags = provenance.tags() | {BACKFILLED_TAG: str(backfilled).lower()}
        self.log(tags={f"{provenance.stage}.{name}": value for name, value in tags.items()})

    def has(self, provenance: Provenance) -> bool:
        """Say whether what a later stage found, from these very inputs, is there."""
        found = self.client.get_run(self.id).data.tags.get(f"{provenance.stage}.fingerprint")
        return bool(found == provenance.fingerprint)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.id, status)


class Store:
    """The tracking store: the runs of this project in it."""

    def __init__(self) -> None:
        """Connect, and make the experiment where it is not there.

        Paths are absolute: DVC runs experiments in a temporary copy and names the original `DVC_ROOT`.
        """
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
        known = {"stage": provenance.stage, "data_sha256": provenance.data_sha256}
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


class TrainingRun:
    """The run of a training that is under way. When the store fails, the training goes on without."""

    def __init__(self, provenance: Provenance, interrupted: str | None) -> None:
        self.id = interrupted
        self.provenance = provenance
        self.untracked = "this training"
        self.epoch_start = time.perf_counter()
        self.run: TrackedRun | None = None

    @contextmanager
    def attempt(self) -> Iterator[TrackedRun | None]:
        """Give the run, if there is one, to what may fail; after a failure there is none."""
        run, self.run = self.run, None
        try:
            with tolerant(self.untracked):
                yield run
                self.run = run
        except KeyboardInterrupt:
            self.run = run
            raise

    def start(self, datasets: Mapping[str, Digits], training: Training) -> None:
        """Begin the run, or go on with the interrupted one, and log what is known by now."""
        with tolerant(self.untracked):
            store = Store()
            self.run = store.reopen(self.id) or store.begin_run(self.provenance, {BACKFILLED_TAG: "false"})
        with self.attempt() as run:
            if run:
                self.id = run.id
                run.log(tags=self.provenance.tags() | environment())
                run.log_start(self.provenance, datasets, training.model)
                run.log_history(result.row() for result in training.history)

    def log_epoch(self, result: EpochResult) -> None:
        """Log an epoch's scores, its learning rate and how long it took."""
        with self.attempt() as run:
            if run:
                run.log_epoch(result.row(), epoch_seconds=time.perf_counter() - self.epoch_start)
                self.untracked = f"this training after epoch {result.epoch}"
        self.epoch_start = time.perf_counter()

    def log_model(self, model: nn.Module, path: Path, example: Tensor) -> None:
        """Log what the stage wrote, and the model (see `TrackedRun.log_model`)."""
        with self.attempt() as run:
            if run:
                run.log_outputs(self.provenance)
                run.log_model(model, path, example)

    def finish(self) -> None:
        """Close the run of a training that ended well."""
        with self.attempt() as run:
            if run:
                run.end("FINISHED")

    def abandon(self, status: str) -> None:
        """Close the run of a training that was stopped: by what is more to say than that the store fails too."""
        with suppress(Exception):
            if self.run:
                self.run.end(status)


@contextmanager
def training_run(
    provenance: Provenance, datasets: Mapping[str, Digits], training: Training, interrupted: str | None
) -> Iterator[TrainingRun]:
    """Open a run for a training and close it as the block ends: well, failed, or killed by a signal.

    It starts with the params, the number of learned parameters and where all of it comes from. The run with the id
    `interrupted` goes on; where the store has lost it, a new one begins. Either has the epochs behind the training.
    """
    run = TrainingRun(provenance, interrupted)
    try:
        run.start(datasets, training)
        yield run
    except BaseException as error:
        run.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.finish()


def describe(metrics: Mapping[str, Any]) -> str:
    """Say in Markdown what a test found."""
    return (
        f"**{metrics['test_accuracy']:.2%}** of {metrics['test_total']:,} test images right, "
        f"{metrics['test_misclassified']} wrong. Loss {metrics['test_loss']:.4f}, "
        f"calibration error {metrics['test_calibration_error']:.2%}, {metrics['parameters']:,} parameters."
    )


@contextmanager
def study_run(name: str) -> Iterator[str | None]:
    """Give the id of the run that the trainings of a study belong to: the one that was interrupted, or a new one."""
    run = None
    with tolerant(name):
        store = Store()
        found = store.search(f"attributes.run_name = '{name}' and attributes.status != 'FINISHED'")
        run = store.reopen(found[0].info.run_id) if found else None
        if run is None:
            created = store.client.create_run(store.experiment_id, run_name=name, tags=resolve_tags({"stage": "study"}))
            run = TrackedRun(store.client, created.info.run_id)
    status = "FAILED"
    try:
        yield run.id if run else None
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with tolerant(name):
            if run:
                run.end(status)


@contextmanager
def tolerant(untracked: str) -> Iterator[None]:
    """Say in one line that something is not tracked, and why, where the store fails in the block.

    Raises:
        UserError: it fails and `MNIST_TRACKING` is `required`.
    """
    choices = ("optional", "required")
    if (choice := os.environ.get("MNIST_TRACKING", choices[0])) not in choices:
        raise UserError(f"MNIST_TRACKING must be {' or '.join(choices)}, and is {choice!r}")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow lets through what SQLAlchemy, requests, Alembic and the disk raise
        message = f"MLflow at {address()} failed ({explain(error)}), so {untracked} is not tracked"
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


def finished_runs(condition: str) -> list[dict[str, Any]]:
    """Return the finished runs that meet a condition in MLflow's search syntax, oldest first.

    Each is flat, under `params.…` and `metrics.…`; of a metric, the last value.
    """
    runs = Store().search(f"attributes.status = 'FINISHED' and {condition}")
    return [flatten({"params": run.data.params, "metrics": run.data.metrics}) for run in reversed(runs)]


def fetch_champion(directory: Path) -> tuple[Path, str] | None:
    """Bring the model file of `models:/mnist@champion` into a directory; return it and the version's name.

    Return None where there is no store, which is not made then, or no champion in it. A store that fails, and a file
    that is not the one its run trained, are told in one line.
    """
    if URI not in os.environ and not DATABASE.exists():
        return None
    try:
        client = Store().client
        if (champion := champion_of(client)) is None:
            return None
        run = client.get_run(champion.run_id or "")
        file = Path(client.download_artifacts(run.info.run_id, str(MODEL), str(directory)))
        if sha256(file) != run.data.tags.get(MODEL_TAG):
            raise UserError(f"{MODEL} of run {run.info.run_id} is not the file that it trained")
    except Exception as error:  # see `tolerant`
        print(f"warning: MLflow at {address()} gives no champion ({explain(error)})", file=sys.stderr, flush=True)
        return None
    return file, f"models:/{REGISTERED}@{CHAMPION}, version {champion.version}"


def champion_of(client: mlflow.MlflowClient) -> ModelVersion | None:
    """Return the version of the registered model that bears the champion's alias, if one does."""
    try:
        return client.get_model_version_by_alias(REGISTERED, CHAMPION)
    except mlflow.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            raise
        return None
