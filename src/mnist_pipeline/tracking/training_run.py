"""The runs of a training and of a study while they are under way."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from torch import Tensor, nn

from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.tracking.provenance import Provenance, environment
from mnist_pipeline.tracking.run import BACKFILLED_TAG, TrackedRun
from mnist_pipeline.tracking.store import Store, continue_untracked


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
            with continue_untracked(self.untracked):
                yield run
                self.run = run
        except KeyboardInterrupt:
            self.run = run
            raise

    def start(self, datasets: Mapping[str, Digits], model: nn.Module, history: Sequence[EpochResult]) -> None:
        """Begin the run, or go on with the interrupted one, and log what is known so far."""
        with continue_untracked(self.untracked):
            store = Store()
            self.run = store.reopen(self.id) or store.begin_run(self.provenance, {BACKFILLED_TAG: "false"})
        with self.attempt() as run:
            if run:
                self.id = run.id
                run.log(tags=self.provenance.tags() | environment())
                run.log_start(self.provenance, datasets, model)
                run.log_history(result.row() for result in history)

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
    provenance: Provenance,
    datasets: Mapping[str, Digits],
    model: nn.Module,
    history: Sequence[EpochResult],
    interrupted: str | None,
) -> Iterator[TrainingRun]:
    """Open the run of a training, and close it when the block ends: as finished, failed, or killed by a signal.

    `interrupted` is the id of a run to go on with; if the store has lost it, a new run begins. The run starts with the
    params, the number of learned parameters, the provenance and the epochs of `history`.
    """
    run = TrainingRun(provenance, interrupted)
    try:
        run.start(datasets, model, history)
        yield run
    except BaseException as error:
        run.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.finish()


@contextmanager
def study_run(name: str) -> Iterator[str | None]:
    """Give the id of the run that the trainings of a study belong to: the one that was interrupted, or a new one."""
    run = None
    with continue_untracked(name):
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
        with continue_untracked(name):
            if run:
                run.end(status)


def close_lost_runs(parent: str | None) -> None:
    """Close as FAILED the trainings of a study that seem to run still, once all of them have ended."""
    if parent:
        with continue_untracked("the end of trainings whose machine died"):
            store = Store()
            for run in store.search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and attributes.status = 'RUNNING'"):
                TrackedRun(store.client, run.info.run_id).end("FAILED")
