"""One trial: its curve and row, how it ends, and the lock that keeps two from the same training.

A few lines stand in for the stage, so that no network is trained.
"""

import hashlib
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.trials import repository_with_data, wait_for

from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.experiments import trial as trial_module
from mnist_pipeline.experiments.trial import EpochScore, Trial, TrialError, TrialProgress, on_one_core, run_trial

HISTORY = "epoch,monitor_accuracy,monitor_loss\n1,0.5,0.9\n2,0.75,0.5\n"
TRAINING = f"""
import os, pathlib, signal, time
here = pathlib.Path(os.environ["DVC_ROOT"])
def trains(): (here / "started").open("a").write("x")
def writes_outputs():
    for path, text in (("reports/history.csv", {HISTORY!r}), ("models/model.safetensors", "trained")):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        pathlib.Path(path).write_text(text)
def waits_for(name):
    while not (here / name).exists(): time.sleep(0.01)
def is_terminated(*_): (here / "terminated").touch(); raise SystemExit(1)
signal.signal(signal.SIGTERM, is_terminated)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TrialProgress]:
    """Start a trial whose training is a line of Python, in a repository that is the working directory."""
    repository_with_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(trial_module, "POLL_SECONDS", 0.02)

    def start(line: str) -> TrialProgress:
        (tmp_path / "stages/train.py").write_text(f"{TRAINING}{line}\n")
        return run_trial(Trial("quick-0", load_params(), ["train"], None))

    return start


def test_a_trial_takes_one_core(params: Params) -> None:
    limited = on_one_core(params.model_copy(update={"threads": 8}))
    assert (limited.threads, limited.train.processes) == (1, 1)


def test_a_trial_yields_its_curve_and_then_its_row(start: Callable[[str], TrialProgress]) -> None:
    *curve, row = [step for step in start("writes_outputs()") if step]
    assert curve == [EpochScore(1, 0.5, 0.9), EpochScore(2, 0.75, 0.5)]
    assert isinstance(row, dict)
    assert 0 <= float(row.pop("seconds")) < 60
    digest = hashlib.sha256(b"trained").hexdigest()
    expected = {"seed": "0", "epochs": "2", "monitor_accuracy": "0.75", "monitor_loss": "0.5", "model_sha256": digest}
    assert row == expected


def test_a_stage_that_fails_is_an_error_with_its_last_line(start: Callable[[str], TrialProgress]) -> None:
    with pytest.raises(TrialError, match=r"^quick-0: train failed: the loss is not finite$"):
        list(start("print('some', 'epochs', sep='\\n'); raise SystemExit('the loss is not finite')"))


def test_closing_a_trial_terminates_its_training(start: Callable[[str], TrialProgress], tmp_path: Path) -> None:
    progress = start("trains(); waits_for('never')")
    wait_for(lambda: next(progress) is None and (tmp_path / "started").exists())
    progress.close()
    assert (tmp_path / "terminated").exists()
    assert list(tmp_path.glob(".checkpoints/*.lock")) == []


def test_while_a_second_process_has_taken_the_lock_over_a_third_waits(
    start: Callable[[str], TrialProgress], tmp_path: Path
) -> None:
    line = "trains(); waits_for(f'permission{(here / \"started\").stat().st_size}'); writes_outputs()"
    first, second = start(line), start(line)
    wait_for(lambda: next(first) is None and (tmp_path / "started").exists())
    assert next(second) is None
    (tmp_path / "permission1").touch()
    list(first)
    wait_for(lambda: next(second) is None and (tmp_path / "started").read_text() == "xx")
    third = start(line)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        assert next(third) is None
    assert (tmp_path / "started").read_text() == "xx", "two processes train the same"
    (tmp_path / "permission2").touch()
    assert isinstance(list(second)[-1], dict)
    (tmp_path / "permission3").touch()
    assert isinstance(list(third)[-1], dict)
    assert list(tmp_path.glob(".checkpoints/*.lock")) == []


def test_a_training_that_outlives_its_killed_study_is_waited_for(
    start: Callable[[str], TrialProgress], tmp_path: Path
) -> None:
    line = "trains(); waits_for('permission'); writes_outputs()"
    killed = multiprocessing.get_context("fork").Process(target=lambda: list(start(line)))
    killed.start()
    wait_for((tmp_path / "started").exists)
    killed.kill()
    killed.join()
    progress = start(line)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        assert next(progress) is None
    assert (tmp_path / "started").read_text() == "x", "two processes train the same"
    (tmp_path / "permission").touch()
    assert isinstance(list(progress)[-1], dict)
    assert (tmp_path / "started").read_text() == "xx"
