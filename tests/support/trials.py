"""Trials that cost nothing: made-up scores in place of trainings, for what studies and sweeps do with them."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mnist_pipeline.common.params import Params
from mnist_pipeline.experiments.pool import TrialPool
from mnist_pipeline.experiments.trial import EpochScore, Trial, TrialProgress
from mnist_pipeline.report.studies import MEASURES
from support import DATA
from support.repository import Repository

EPOCHS = 4


class MadeUpTrials:
    """Runs trials of four epochs, one at a time; their last accuracy is a function of the params."""

    def __init__(self, accuracy: Callable[[Params], float]) -> None:
        self.accuracy = accuracy
        self.trials: list[Trial] = []
        self.epochs: dict[str, int] = {}

    @contextmanager
    def open_pool(self, name: str, ray_address: str | None) -> Iterator[TrialPool]:
        """Stand in for the pool of the package: without MLflow."""
        with TrialPool(1, self.run_trial) as pool:
            yield pool

    def run_trial(self, trial: Trial) -> TrialProgress:
        self.trials.append(trial)
        accuracy = self.accuracy(trial.params)
        for epoch in range(1, EPOCHS + 1):
            yield None
            self.epochs[trial.name] = epoch
            yield EpochScore(epoch, accuracy * epoch / EPOCHS, 1.0)
        row = {"seed": trial.params.seed, "epochs": EPOCHS, "seconds": len(self.trials)}
        row |= {"monitor_accuracy": accuracy, "monitor_loss": 1 - accuracy}
        if "evaluate" in trial.stages:
            row |= dict.fromkeys(MEASURES, accuracy)
        row["model_sha256"] = hashlib.sha256(str(accuracy).encode()).hexdigest()
        yield {name: str(value) for name, value in row.items()}

    @property
    def learning_rates(self) -> list[float]:
        return [trial.params.train.learning_rate for trial in self.trials]


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def repository_with_data(root: Path, fresh: bool = True, **params: object) -> Repository:
    """The pipeline with its data; it has no database if it is fresh, since made-up trials need none."""
    repository = Repository.create(root, fresh=fresh, **params)
    shutil.copytree(DATA, root / "data/raw")
    return repository
