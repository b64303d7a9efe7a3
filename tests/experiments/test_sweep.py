"""Sweeps: the search is resumable, and its winner is a recipe."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.repository import Repository
from support.stores import isolated_tracking
from support.trials import MadeUpTrials, repository_with_data, wait_for

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import load_params
from mnist_pipeline.experiments import sweep as sweep_module
from mnist_pipeline.experiments.sweep import run_sweep
from mnist_pipeline.experiments.trial import TrialError

RATES = "params:\n  train.learning_rate: {low: 0.001, high: 0.1, log: true}\n"
MakeTrials = Callable[[Callable[[float], float]], MadeUpTrials]


def write(name: str, text: str) -> Path:
    Path(name).write_text(text)
    return Path(name)


# The search, with made-up trials


@pytest.fixture
def make_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTrials:
    """Make up the trials of all sweeps that follow, by a function of the learning rate."""
    repository_with_data(tmp_path, validation_size=100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def make(accuracy: Callable[[float], float]) -> MadeUpTrials:
        trials = MadeUpTrials(lambda params: accuracy(params.train.learning_rate))
        monkeypatch.setattr(sweep_module, "open_pool", trials.open_pool)
        return trials

    return make


def test_the_winner_is_written_as_a_recipe(make_trials: MakeTrials, capsys: pytest.CaptureFixture[str]) -> None:
    made_up = make_trials(lambda rate: rate)
    write("experiments/start.yaml", "train:\n  optimizer: sgd\n  epochs: 4\n")
    run_sweep(write("rates.yaml", f"recipe: start\n{RATES}"), 4)
    winner = Path("experiments/rates.yaml")
    overlay = yaml.safe_load(winner.read_text())
    assert overlay == {"train": {"epochs": 4, "optimizer": "sgd", "learning_rate": max(made_up.learning_rates)}}
    params = load_params(overlay=winner)
    assert (params.threads, params.data.validation_size) == (1, 100)  # those of params.yaml
    assert {tuple(trial.stages) for trial in made_up.trials} == {("train",)}
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith("Next: mnist experiment rates")
    assert re.search(r"(?m)^\| trial +\| validation accuracy +\| loss +\| train.learning_rate +\| end +\|$", printed)
    first_row = printed[printed.index("| trial") :].splitlines()[2]
    assert f"| {max(made_up.learning_rates)}" in first_row

    run_sweep(Path("rates.yaml"), 4)  # all there
    assert len(made_up.trials) == 4
    run_sweep(Path("rates.yaml"), 6)
    assert len(set(made_up.learning_rates)) == 6


def test_the_mean_over_the_folds_decides_and_a_sweep_that_died_repeats_no_fold(make_trials: MakeTrials) -> None:
    class Died(BaseException):
        pass

    def accuracy(rate: float) -> float:
        if len(made_up.trials) == 5:
            raise Died
        return (0.9, 0.1, 0.2)[made_up.trials[-1].params.seed] if rate == 0.1 else 0.5

    made_up = make_trials(accuracy)
    write("experiments/start.yaml", "train:\n  epochs: 4\n")
    space = write("folds.yaml", "recipe: start\nfolds: 3\nparams:\n  train.learning_rate: [0.1, 0.2]\n")
    with pytest.raises(Died):
        run_sweep(space, 2)
    run_sweep(space, 2)
    trained = [(trial.params.train.learning_rate, trial.params.seed) for trial in made_up.trials]
    assert trained[4] == trained.pop(5)  # the one that died
    assert sorted(trained) == [(rate, seed) for rate in (0.1, 0.2) for seed in range(3)]
    assert load_params(overlay=Path("experiments/folds.yaml")).train.learning_rate == 0.2


def test_a_recipe_that_no_sweep_wrote_is_kept(make_trials: MakeTrials) -> None:
    made_up = make_trials(lambda rate: rate)
    with pytest.raises(UserError, match=r"experiments/best.yaml was not written by a sweep"):
        run_sweep(write("best.yaml", RATES), 2)
    assert made_up.trials == []


@pytest.mark.parametrize(("others", "epochs"), [("", 1), ("  train.epochs: [4]\n", 4)])
def test_a_trial_under_the_median_is_stopped_if_it_can_be_compared(
    others: str, epochs: int, make_trials: MakeTrials
) -> None:
    write("experiments/start.yaml", "train:\n  epochs: 4\n")
    accuracies = [0.9, 0.8, 0.85, 0.9, 0.95, 0.1]
    made_up = make_trials(lambda rate: accuracies[len(made_up.trials) - 1])
    run_sweep(write("rates.yaml", f"recipe: start\n{RATES}{others}"), 6)
    assert list(made_up.epochs.values()) == [4, 4, 4, 4, 4, epochs]


def test_each_point_of_a_small_space_is_tried_once(make_trials: MakeTrials) -> None:
    made_up = make_trials(lambda rate: rate)
    text = "params:\n  train.learning_rate: [0.1, 0.2, 0.3]\n  train.batch_size: {low: 8, high: 9}\n"
    run_sweep(write("few.yaml", text), 50)
    assert len({(trial.params.train.learning_rate, trial.params.train.batch_size) for trial in made_up.trials}) == 6
    assert len(made_up.trials) == 6


def test_a_trial_that_fails_does_not_win(make_trials: MakeTrials, capsys: pytest.CaptureFixture[str]) -> None:
    def diverge(rate: float) -> float:
        if rate > 0.1:
            raise TrialError("the loss is not finite")
        return rate

    make_trials(diverge)
    run_sweep(write("few.yaml", "params:\n  train.learning_rate: [0.1, 0.2]\n"), 2)
    assert "the loss is not finite" in capsys.readouterr().out
    assert load_params(overlay=Path("experiments/few.yaml")).train.learning_rate == 0.1

    with pytest.raises(UserError, match="none of 2 trials succeeded"):
        run_sweep(write("bad.yaml", "params:\n  train.learning_rate: [0.2, 0.3]\n"), 2)


def test_a_trial_that_was_under_way_when_the_sweep_died_runs_again_with_the_same_params(
    make_trials: MakeTrials,
) -> None:
    class Died(BaseException):
        pass

    def die(rate: float) -> float:
        raise Died

    before = make_trials(lambda rate: rate)
    run_sweep(write("rates.yaml", RATES), 2)
    died = make_trials(die)
    with pytest.raises(Died):
        run_sweep(Path("rates.yaml"), 3)
    again = make_trials(lambda rate: rate)
    run_sweep(Path("rates.yaml"), 3)
    assert again.learning_rates == died.learning_rates
    assert [trial.name for trial in again.trials] == [trial.name for trial in died.trials] == ["rates-2"]
    assert len(set(before.learning_rates + again.learning_rates)) == 3


def test_two_sweeps_of_a_name_do_not_run_at_once(make_trials: MakeTrials) -> None:
    def sweep_again(rate: float) -> float:
        run_sweep(Path("rates.yaml"), 2)
        return rate

    make_trials(sweep_again)
    with pytest.raises(UserError, match="another process is running the sweep rates: wait until it ends"):
        run_sweep(write("rates.yaml", RATES), 2)


# The real thing


def start_until_all_train(repository: Repository, trials: int) -> "subprocess.Popen[str]":
    """Start a sweep in a process, and return it once as many trials as run at once have trained an epoch."""
    (repository.root / "rates.yaml").write_text(RATES)
    driver = repository.start("mnist", "sweep", "rates.yaml", "--trials", str(trials))
    at_once = min(trials, os.cpu_count() or 1)
    wait_for(lambda: len(list(repository.root.glob(".checkpoints/*.safetensors"))) == at_once)
    return driver


@pytest.mark.pipeline
@pytest.mark.thorough
def test_an_interrupted_sweep_ends_its_trainings_and_goes_on_when_it_is_called_again(tmp_path: Path) -> None:
    repository = repository_with_data(tmp_path, fresh=False, validation_size=100, epochs=10, batch_size=16)
    driver = start_until_all_train(repository, trials=1)
    driver.terminate()
    printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 130, printed
    assert {run.info.status for run in repository.runs()} == {"KILLED"}

    with isolated_tracking(tmp_path):
        run_sweep(Path("rates.yaml"), 1)
    check_finished_sweep(repository, trials=1, epochs=10)


@pytest.mark.pipeline
@pytest.mark.thorough
def test_a_sweep_whose_process_is_killed_goes_on(tmp_path: Path) -> None:
    repository = repository_with_data(tmp_path, fresh=False, validation_size=100, epochs=40, batch_size=16)
    driver = start_until_all_train(repository, trials=2)
    driver.kill()
    driver.wait()
    again = repository.run("mnist", "sweep", "rates.yaml", "--trials", "2")
    assert again.returncode == 0, again.stdout
    assert again.stdout.endswith("Next: mnist experiment rates\n")
    check_finished_sweep(repository, trials=2, epochs=40)


def check_finished_sweep(repository: Repository, trials: int, epochs: int) -> None:
    runs = {run.info.run_name: run for run in repository.runs()}
    assert set(runs) == {"sweep rates", *(f"rates-{number}" for number in range(trials))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs.pop("sweep rates").info.run_id
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert repository.steps(run) == list(range(1, epochs + 1))  # each once: it went on from its checkpoint
        assert not any(name.startswith("test_") for name in run.data.metrics)
    best = max(runs.values(), key=lambda run: (run.data.metrics["monitor_accuracy"], -run.data.metrics["monitor_loss"]))
    winner = yaml.safe_load((repository.root / "experiments/rates.yaml").read_text())
    assert winner["train"] == {"learning_rate": float(best.data.params["train.learning_rate"])}
    assert [path.name for path in repository.root.glob(".checkpoints/*") if len(path.stem) == 64] == []
