"""The runs of a training and of a study while they last."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from torch import Tensor, nn

from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.tracking.provenance import Provenance, describe_machine
from mnist_pipeline.tracking.run import TrackedRun
from mnist_pipeline.tracking.store import Store, continue_untracked


class TrainingRun:
    """The run of a training that is under way. When the store fails, the training goes on without it."""

    def __init__(self, provenance: Provenance, interrupted: str | None) -> None:
        self.id = interrupted
        self.tracked: TrackedRun | None = None
        self._provenance = provenance
        self._untracked = "this training"
        self._epoch_start = time.perf_counter()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Go on after a failure of the store in the block; from then on there is no run."""
        with continue_untracked(self._untracked):
            try:
                yield
            except Exception:
                self.tracked = None
                raise

    def start(self, datasets: Mapping[str, Digits], model: nn.Module, history: Sequence[EpochResult]) -> None:
        """Begin the run or reopen the interrupted one, and log what is known so far."""
        with self._attempt():
            store = Store()
            store.close_dead_runs()
            unfinished = store.unfinished_run_of(self._provenance)
            resumed = store.reopen_run(self.id) or store.reopen_run(unfinished.id if unfinished else None)
            run = resumed or store.begin_run(self._provenance)
            self.id, self.tracked = run.id, run
            run.log_start(self._provenance, datasets, model, describe_machine())
            run.log_history(result.row() for result in history)

    def log_epoch(self, result: EpochResult) -> None:
        """Log an epoch's scores, its learning rate and its duration."""
        with self._attempt():
            if self.tracked:
                self.tracked.log_epoch(result.row(), epoch_seconds=time.perf_counter() - self._epoch_start)
                self._untracked = f"this training after epoch {result.epoch}"
        self._epoch_start = time.perf_counter()

    def log_model(self, model: nn.Module, path: Path, example: Tensor) -> None:
        """Log what the stage wrote, and the model (see `TrackedRun.log_end`)."""
        with self._attempt():
            if self.tracked:
                self.tracked.log_end(self._provenance, model, path, example)

    def finish(self) -> None:
        """Close the run of a training that ended well."""
        with self._attempt():
            if self.tracked:
                self.tracked.close("FINISHED")


@contextmanager
def training_run(
    provenance: Provenance,
    datasets: Mapping[str, Digits],
    model: nn.Module,
    history: Sequence[EpochResult],
    interrupted: str | None,
) -> Iterator[TrainingRun]:
    """Open the run of a training, and close it after the block: as finished, failed, or killed by a signal.

    `interrupted` is the id of a run to continue; if the store has lost it, a new run begins. The run starts with the
    params, the number of learned parameters, the provenance and the epochs of `history`.
    """
    run = TrainingRun(provenance, interrupted)
    try:
        run.start(datasets, model, history)
        yield run
    except BaseException as error:
        with suppress(Exception):  # the error matters more than a store that fails too
            if run.tracked:
                run.tracked.close(_status_after(error))
        raise
    run.finish()


@contextmanager
def parent_run(name: str) -> Iterator[str | None]:
    """Give the id of the run that the trainings of a study belong to: the interrupted one, or a new one."""
    run, status = None, "FINISHED"
    with continue_untracked(name):
        store = Store()
        found = store.search_runs(f"attributes.run_name = '{name}' and attributes.status != 'FINISHED'")
        run = store.reopen_run(found[0].info.run_id) if found else store.create_run(name, {"stage": "study"})
    try:
        yield run.id if run else None
    except BaseException as error:
        status = _status_after(error)
        raise
    finally:
        with continue_untracked(name):
            if run:
                run.close(status)


def _status_after(error: BaseException) -> str:
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def close_lost_runs(parent: str | None) -> None:
    """Close as FAILED the trainings of a study that still seem to run, after all of them have ended."""
    if parent:
        with continue_untracked("the end of trainings whose machine died"):
            store = Store()
            of_study = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'"
            for run in store.search_runs(f"{of_study} and attributes.status = 'RUNNING'"):
                TrackedRun(store.client, run.info.run_id).close("FAILED")
