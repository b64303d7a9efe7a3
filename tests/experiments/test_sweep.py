"""Sweeps: spaces are checked before anything starts, the search is resumable, and its winner is a recipe."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from support import ROOT
from support.repository import Repository

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import load_params
from mnist_pipeline.experiments import sweep as sweep_module
from mnist_pipeline.experiments.places import workers
from mnist_pipeline.experiments.space import load_space
from mnist_pipeline.experiments.sweep import sweep
from mnist_pipeline.experiments.trial import Point, Progress, Trial, TrialError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Spaces


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params:\n  train.rate: [1]\n", r"params.train.rate is unknown: choose from .*train.learning_rate"),
        ("params:\n  data.validation_size: [1]\n", "params.data.validation_size is unknown"),
        ("params:\n  train.processes: [1]\n", "params.train.processes is unknown"),
        ("params:\n  train.epochs: {low: '1e-3', high: 2}\n", r"epochs.low must be .* the text '1e-3' \(write 0.001\)"),
        ("params:\n  train.epochs: {low: 1.5, high: 2}\n", "epochs.low must be an integer, as the param is"),
        ("params:\n  train.epochs: {low: 0, high: 2}\n", "train.epochs must be greater than or equal to 1, and is 0"),
        ("params:\n  train.epochs: {low: 2, high: 2}\n", r"epochs.high must be above low \(2\), and is 2"),
        ("params:\n  train.epochs: {lo: 2, high: 3}\n", "low is missing; lo is unknown: choose from low, high, log"),
        ("params:\n  model.dropout: {low: 0, high: 0.1, log: true}\n", "dropout.low must be above 0 with log"),
        ("params:\n  model.dropout: {low: 0, high: 1.0}\n", "model.dropout must be less than 1, and is 1.0"),
        ("params:\n  model.dropout: 0.1\n", r"must be a list of choices or a range such as .*, and is 0.1"),
        ("params:\n  train.optimizer: {low: 1, high: 2}\n", "train.optimizer must be a list of choices, and is a sec"),
        ("params:\n  train.optimizer: [adam, lion]\n", "train.optimizer must be 'adam', .* and is the text 'lion'"),
        ("recipe: worst\nparams:\n  seed: [1]\n", "experiments/worst.yaml is absent: the recipes are specification"),
        ("recipes: best\nparams:\n  seed: [1]\n", "recipes is unknown: choose from recipe, params"),
        ("params: {}\n", "params must name what to search"),
        ("- 1\n", "must hold sections"),
    ],
)
def test_a_wrong_space_is_told_in_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    space = write(tmp_path / "odd.yaml", text)
    with pytest.raises(UserError, match=said) as error:
        load_space(space)
    assert str(error.value).startswith(str(space))
    assert "\n" not in str(error.value)


def test_a_space_keeps_types_and_starts_from_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = """
recipe: best
params:
  train.learning_rate: {low: 0.003, high: 0.03, log: true}
  train.epochs: {low: 2, high: 4}
  model.dropout: {low: 0, high: 0.2}
  model.bias: [true, false]
  model.channels: [[4, 4, 4, 4, 4, 4], [5, 5, 5, 5, 5, 5]]
"""
    space = load_space(write(tmp_path / "wide.yaml", text))
    drawn = {"train.learning_rate": 0.0123456, "train.epochs": 3, "model.dropout": 0.0, "model.bias": "false"}
    values = space.values(drawn | {"model.channels": "[5, 5, 5, 5, 5, 5]"})
    params = space.trial_at(values)
    assert (params.train.learning_rate, params.train.epochs, params.model.bias) == (0.01235, 3, False)
    assert params.model.channels == [5] * 6
    assert (params.threads, params.train.processes, params.data.validation_size) == (1, 1, 5000)
    best = load_params(overlay=Path("experiments/best.yaml"))
    assert params.train.augmentation == best.train.augmentation


# The search, with trainings made up


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository with data, the working directory, in which no trial tells MLflow."""
    repository = Repository.create(tmp_path, validation_size=100)
    assert repository.stage("download").returncode == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(sweep_module, "study_run", lambda name: nullcontext())
    return repository


class MadeUp:
    """Trainings of four epochs whose accuracy is set by a function of the learning rate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[float], float]) -> None:
        self.accuracy = accuracy
        self.trials: list[Trial] = []
        self.epochs: dict[str, int] = {}
        monkeypatch.setattr(sweep_module, "open_place", lambda address: nullcontext((1, self.run)))

    def run(self, trial: Trial) -> Progress:
        self.trials.append(trial)
        for epoch in range(1, 5):
            yield None
            self.epochs[trial.name] = epoch
            yield Point(epoch, self.accuracy(trial.params.train.learning_rate) * epoch / 4, 1.0)
        accuracy = self.accuracy(trial.params.train.learning_rate)
        yield {"seed": "0", "monitor_accuracy": str(accuracy), "monitor_loss": str(1 - accuracy)}

    @property
    def rates(self) -> list[float]:
        return [trial.params.train.learning_rate for trial in self.trials]


RATES = "params:\n  train.learning_rate: {low: 0.001, high: 0.1, log: true}\n"


@pytest.mark.pipeline
def test_the_winner_is_written_as_a_recipe(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(repository.root / "experiments/start.yaml", "train:\n  optimizer: sgd\n  epochs: 4\n")
    made_up = MadeUp(monkeypatch, lambda rate: rate)
    sweep(write(repository.root / "rates.yaml", f"recipe: start\n{RATES}"), 4)
    winner = repository.root / "experiments/rates.yaml"
    overlay = yaml.safe_load(winner.read_text())
    assert overlay == {"train": {"epochs": 4, "optimizer": "sgd", "learning_rate": max(made_up.rates)}}
    params = load_params(overlay=winner)
    assert (params.threads, params.data.validation_size) == (1, 100)  # those of params.yaml
    assert {tuple(trial.stages) for trial in made_up.trials} == {("train",)}
    said = capsys.readouterr().out
    assert said.splitlines()[-1].endswith("Next: mnist experiment rates")
    assert re.search(r"(?m)^\| trial \| validation accuracy \| loss \| train.learning_rate \| end \|$", said)

    sweep(Path("rates.yaml"), 4)  # all there
    assert len(made_up.trials) == 4
    sweep(Path("rates.yaml"), 6)
    assert len(set(made_up.rates)) == 6


@pytest.mark.pipeline
def test_another_recipe_of_the_name_is_kept(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp(monkeypatch, lambda rate: rate)
    with pytest.raises(UserError, match=r"experiments/best.yaml is there and no sweep's winner"):
        sweep(write(repository.root / "best.yaml", RATES), 2)
    assert made_up.trials == []


@pytest.mark.pipeline
@pytest.mark.parametrize(("others", "epochs"), [("", 1), ("  train.epochs: [4]\n", 4)])
def test_a_trial_under_the_median_is_stopped_if_it_can_be_compared(
    others: str, epochs: int, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(repository.root / "experiments/start.yaml", "train:\n  epochs: 4\n")
    accuracies = [0.9, 0.8, 0.85, 0.9, 0.95, 0.1]
    made_up = MadeUp(monkeypatch, lambda rate: accuracies[len(made_up.trials) - 1])
    sweep(write(repository.root / "rates.yaml", f"recipe: start\n{RATES}{others}"), 6)
    assert list(made_up.epochs.values()) == [4, 4, 4, 4, 4, epochs]


@pytest.mark.pipeline
def test_each_point_of_a_small_space_is_tried_once(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp(monkeypatch, lambda rate: rate)
    text = "params:\n  train.learning_rate: [0.1, 0.2, 0.3]\n  train.batch_size: {low: 8, high: 9}\n"
    sweep(write(repository.root / "few.yaml", text), 50)
    assert len({(trial.params.train.learning_rate, trial.params.train.batch_size) for trial in made_up.trials}) == 6
    assert len(made_up.trials) == 6


@pytest.mark.pipeline
def test_a_trial_that_fails_is_left_behind(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(rate: float) -> float:
        if rate > 0.1:
            raise TrialError("the loss is not finite")
        return rate

    MadeUp(monkeypatch, diverge)
    sweep(write(repository.root / "few.yaml", "params:\n  train.learning_rate: [0.1, 0.2]\n"), 2)
    assert "the loss is not finite" in capsys.readouterr().out
    assert load_params(overlay=Path("experiments/few.yaml")).train.learning_rate == 0.1

    with pytest.raises(UserError, match="none of 2 trials ended well"):
        sweep(write(repository.root / "bad.yaml", "params:\n  train.learning_rate: [0.2, 0.3]\n"), 2)


@pytest.mark.pipeline
def test_where_ray_is_absent_it_is_told_how_to_get_it(repository: Repository) -> None:
    (repository.root / "ray").mkdir()
    write(repository.root / "ray/__init__.py", "raise ImportError\n")
    write(repository.root / "few.yaml", "params:\n  train.learning_rate: [0.1, 0.2]\n")
    command = ["mnist", "sweep", "few.yaml", "--trials", "1", "--ray", "127.0.0.1:6379"]
    said = repository.run(*command, PYTHONPATH=f"src{os.pathsep}.")
    assert said.returncode == 1
    assert said.stdout == 'error: --ray needs Ray, which is absent: `pip install --editable ".[cluster]"`\n'


@pytest.mark.pipeline
def test_what_ends_the_sweep_runs_again_with_the_same_params(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(rate: float) -> float:
        raise Died

    made_up = MadeUp(monkeypatch, lambda rate: rate)
    sweep(write(repository.root / "rates.yaml", RATES), 2)
    died = MadeUp(monkeypatch, die)
    with pytest.raises(Died):
        sweep(Path("rates.yaml"), 3)
    again = MadeUp(monkeypatch, lambda rate: rate)
    sweep(Path("rates.yaml"), 3)
    assert again.rates == died.rates
    assert [trial.name for trial in again.trials] == [trial.name for trial in died.trials] == ["rates-2"]
    assert len(set(made_up.rates + again.rates)) == 3


def test_workers_stop_what_runs_as_they_are_left() -> None:
    closed = []

    def run(trial: Trial) -> Iterator[None]:
        try:
            while True:
                time.sleep(0.01)
                yield None
        finally:
            closed.append(trial)

    with workers((2, run)) as pool:  # type: ignore[arg-type]
        for task in range(5):
            pool.pool.submit(pool.run, task)  # type: ignore[arg-type]
        time.sleep(0.1)
    assert sorted(closed) == [0, 1]


# The real thing


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.pipeline
def test_a_sweep_whose_process_is_killed_goes_on(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path, validation_size=100, epochs=40, batch_size=16).init()
    assert repository.stage("download").returncode == 0
    write(tmp_path / "rates.yaml", RATES)
    sweep = ["mnist", "sweep", "rates.yaml", "--trials", "2"]

    driver = repository.start(*sweep)
    wait_for(lambda: len(list(tmp_path.glob(".checkpoints/*.safetensors"))) == min(2, os.cpu_count() or 1))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    again = repository.run(*sweep)
    assert again.returncode == 0, again.stdout
    assert again.stdout.endswith("Next: mnist experiment rates\n")

    runs = {run.info.run_name: run for run in repository.runs()}
    assert set(runs) == {"sweep rates", "rates-0", "rates-1"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs.pop("sweep rates").info.run_id
    winner = yaml.safe_load((tmp_path / "experiments/rates.yaml").read_text())
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert repository.steps(run) == list(range(1, 41))  # each once: it went on from its checkpoint
        assert not any(name.startswith("test_") for name in run.data.metrics)
    best = max(runs.values(), key=lambda run: (run.data.metrics["monitor_accuracy"], -run.data.metrics["monitor_loss"]))
    assert winner["train"] == {"learning_rate": float(best.data.params["train.learning_rate"])}
    assert [path.suffix for path in tmp_path.glob(".checkpoints/*") if len(path.stem) == 64] == []


@pytest.mark.pipeline
def test_a_sweep_that_is_interrupted_ends_its_trainings(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path, validation_size=100, epochs=10000, batch_size=16).init()
    assert repository.stage("download").returncode == 0
    write(tmp_path / "rates.yaml", RATES)
    driver = repository.start("mnist", "sweep", "rates.yaml", "--trials", "4")
    wait_for(lambda: len(list(tmp_path.glob(".checkpoints/*.safetensors"))) == min(2, os.cpu_count() or 1))
    driver.terminate()
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode != 0, said
    assert {run.info.status for run in repository.runs()} == {"KILLED"}
