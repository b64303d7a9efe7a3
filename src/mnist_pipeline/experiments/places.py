"""Where the trials of a study or a sweep run side by side: in processes of this machine, or in a Ray cluster."""

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import TypeVar

from mnist_pipeline.experiments.trial import Point, Progress, Row, Trial, run_trial

Task = TypeVar("Task")
Result = TypeVar("Result")
Place = tuple[int, Callable[[Trial], Progress]]  # how many trials at once, and what runs one


def open_place(address: str | None) -> AbstractContextManager[Place]:
    """Give the cluster at an address of Ray or, without one, this machine: a trial for each core.

    Raises:
        UserError: there is no such cluster, or it cannot be used.
    """
    if address is None:
        return nullcontext((os.cpu_count() or 1, run_trial))
    from mnist_pipeline.experiments.cluster import connect

    return connect(address)


class Workers:
    """A thread for each trial that a place runs at once."""

    def __init__(self, place: Place) -> None:
        size, self.start = place
        self.pool = ThreadPoolExecutor(size)
        self.stopping = threading.Event()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Call a function for each task, in threads; yield tasks with their results as these are there."""
        futures = {self.pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def run(self, trial: Trial, hopeless: Callable[[Point], bool] = lambda point: False) -> Row | None:
        """Run a trial to its end and return its row; none if a point of its curve was hopeless, or all are to stop.

        Raises:
            UserError: the trial failed, or the place.
        """
        with closing(self.start(trial)) as progress:
            for step in progress:
                if isinstance(step, dict):
                    return step
                if self.stopping.is_set() or (step and hopeless(step)):
                    break
        return None


@contextmanager
def workers(place: Place) -> Generator[Workers]:
    """Give the workers of a place; as the block ends, those that run are stopped, and the others never start."""
    found = Workers(place)
    try:
        yield found
    finally:
        found.stopping.set()
        found.pool.shutdown(cancel_futures=True)
