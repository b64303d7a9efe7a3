"""The pool that runs trials side by side."""

import time

import pytest
from support import ROOT

from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.experiments.pool import TrialPool
from mnist_pipeline.experiments.trial import EpochScore, Trial, TrialProgress


class Endless:
    """Trials that never end, but for the first, which has a row."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.closed: list[str] = []

    def run_trial(self, trial: Trial) -> TrialProgress:
        self.started.append(trial.name)
        try:
            while True:
                time.sleep(0.01)
                yield {"seed": "0"} if trial.name == "0" else EpochScore(1, 0.5, 1.0)
        finally:
            self.closed.append(trial.name)


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def test_leaving_the_pool_stops_what_runs_and_starts_nothing_more(params: Params) -> None:
    trials = Endless()
    with TrialPool(2, trials.run_trial) as pool:
        rows = pool.map(lambda number: pool.run(str(number), params, []), range(9))
        assert next(rows) == {"seed": "0"}
    assert sorted(trials.closed) == sorted(trials.started)
    assert len(trials.started) < 9


def test_a_hopeless_trial_is_closed_and_has_no_row(params: Params) -> None:
    trials = Endless()
    with TrialPool(1, trials.run_trial, parent="run") as pool:
        assert pool.run("1", params, ["train"], lambda score: score.epoch == 1) is None
    assert trials.closed == ["1"]
