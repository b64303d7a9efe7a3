"""Trials side by side: one for each core of this machine, or of a Ray cluster."""

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Self, TypeVar

from mnist_pipeline.common.params import Params
from mnist_pipeline.experiments.trial import EpochScore, RunTrial, StudyRow, Trial, run_trial
from mnist_pipeline.tracking.training_run import close_lost_runs, parent_run

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class TrialPool:
    """A thread for each trial that runs at once. When the `with` block ends, running trials stop and no other starts.

    `run_trial` runs one trial, here or in a cluster. All trials become children of the MLflow run `parent`.
    """

    def __init__(self, size: int, run_trial: RunTrial, parent: str | None = None) -> None:
        self.size = size
        self.stopping = threading.Event()
        self._run_trial = run_trial
        self._parent = parent
        self._threads = ThreadPoolExecutor(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self._threads.shutdown(cancel_futures=True)

    def map(self, function: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
        """Call a function for each task, in threads, and yield each result as soon as it is there."""
        for future in as_completed([self._threads.submit(function, task) for task in tasks]):
            yield future.result()

    def run(
        self,
        name: str,
        params: Params,
        stages: Sequence[str],
        is_hopeless: Callable[[EpochScore], bool] = lambda score: False,
    ) -> StudyRow | None:
        """Run a trial and return its row; None if a score was hopeless or the pool is stopping.

        Raises:
            TrialError: the trial failed.
            UserError: the cluster cannot run it.
        """
        with closing(self._run_trial(Trial(name, params, stages, self._parent))) as progress:
            for step in progress:
                if isinstance(step, dict):
                    return step
                if self.stopping.is_set() or (step and is_hopeless(step)):
                    break
        return None


@contextmanager
def open_pool(name: str, ray_address: str | None) -> Generator[TrialPool]:
    """Open the pool of a study or sweep, and an MLflow run of that name as its trials' parent.

    Trials run on this machine, or in the Ray cluster whose head is at `ray_address`.

    Raises:
        UserError: the cluster cannot be used.
    """
    machines: AbstractContextManager[tuple[int, RunTrial]] = nullcontext((os.cpu_count() or 1, run_trial))
    if ray_address is not None:
        from mnist_pipeline.experiments.cluster import connect_cluster

        machines = connect_cluster(ray_address)
    with machines as (size, run), parent_run(name) as parent:
        with TrialPool(size, run, parent) as pool:
            yield pool
        close_lost_runs(parent)
