"""An interrupted training goes on where it was and ends as if nothing had happened."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import DATA
from support.in_process import run_stage
from support.repository import Repository, after_an_epoch

from mnist_pipeline.common.params import Params, TrainParams
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.checkpoint import Checkpoint
from mnist_pipeline.training.loop import Training, start_training, train

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return Checkpoint("f" * 64)


def shrunk(params: Params, optimizer: str, **changes: object) -> TrainParams:
    scheduler = params.train.scheduler.model_copy(update={"step_size": 2})
    update = {"epochs": 4, "batch_size": 64, "optimizer": optimizer, "scheduler": scheduler}
    return params.train.model_copy(update=update | changes)


def start(params: Params, train_params: TrainParams) -> Training:
    return start_training(build_model(params.model, seed=3), train_params)


def run_epochs(training: Training, params: Params, train_params: TrainParams, epochs: int) -> None:
    digits, monitor = (load_digits(DATA, part).tensors(params.data, CPU) for part in ("train", "test"))
    for result in train(training, digits, monitor, train_params, seed=3):
        if result.epoch == epochs:
            break


@pytest.mark.parametrize(
    ("optimizer", "changes", "interrupted_after"),
    [
        ("adam", {}, 1),
        ("adam", {}, 3),
        ("adamw", {"averaging": 0.9}, 2),
        ("muon", {"averaging": 0.9}, 2),
        ("sgd", {}, 2),
    ],
)
def test_a_training_that_goes_on_ends_like_one_that_was_never_interrupted(
    params: Params, checkpoint: Checkpoint, optimizer: str, changes: dict[str, object], interrupted_after: int
) -> None:
    train_params = shrunk(params, optimizer, **changes)
    whole = start(params, train_params)
    run_epochs(whole, params, train_params, 4)

    first = start(params, train_params)
    run_epochs(first, params, train_params, interrupted_after)
    checkpoint.save(first, "a run")
    second = start(params, train_params)
    assert checkpoint.restore(second) == "a run"
    run_epochs(second, params, train_params, 4)

    assert second.history == whole.history
    for found, expected in ((second.model, whole.model), (second.network, whole.network)):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name


def test_without_a_checkpoint_a_training_starts_anew(params: Params, checkpoint: Checkpoint) -> None:
    training = start(params, shrunk(params, "adam"))
    assert checkpoint.restore(training) is None
    assert training.history == []


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"no" * 999])
def test_a_damaged_checkpoint_is_named_and_ignored(
    params: Params, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], damage: object
) -> None:
    train_params = shrunk(params, "adam")
    training = start(params, train_params)
    run_epochs(training, params, train_params, 1)
    checkpoint.save(training, "a run")
    checkpoint.path.write_bytes(damage(checkpoint.path.read_bytes()))  # type: ignore[operator]
    fresh = start(params, train_params)
    assert checkpoint.restore(fresh) is None
    assert fresh.history == []
    assert str(checkpoint.path) in capsys.readouterr().out


def workspace(root: Path) -> Repository:
    """Return a pipeline in which the train stage runs for eight epochs."""
    repository = Repository.create(root, epochs=8, batch_size=32)
    shutil.copytree(DATA, root / "data/raw")
    return repository


def start_stage(repository: Repository) -> "subprocess.Popen[str]":
    return repository.start(sys.executable, "stages/train.py")


def outputs(repository: Repository) -> list[bytes]:
    return [(repository.root / name).read_bytes() for name in ("models/model.safetensors", "reports/history.csv")]


def interrupt_after_an_epoch(process: "subprocess.Popen[str]", number: signal.Signals, delay: float) -> str:
    """Send a signal some time after the first whole epoch, and return what the process said."""

    def interrupt() -> None:
        time.sleep(delay)
        process.send_signal(number)

    return after_an_epoch(process, interrupt)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    repository = workspace(tmp_path_factory.mktemp("uninterrupted"))
    assert repository.stage("train").returncode == 0
    return outputs(repository)


@pytest.mark.pipeline
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.thorough)])
def test_a_training_that_is_killed_ends_with_the_same_bytes_in_one_run(
    tmp_path: Path, uninterrupted: list[bytes], kills: int
) -> None:
    repository = workspace(tmp_path)
    moments = random.Random(7)
    for _ in range(kills):
        interrupt_after_an_epoch(start_stage(repository), signal.SIGKILL, moments.uniform(0, 0.3))
        assert list(tmp_path.glob("models/*")) == []
    last = repository.stage("train")
    assert last.returncode == 0, last.stdout
    assert "Going on after epoch" in last.stdout
    assert outputs(repository) == uninterrupted
    assert list(tmp_path.glob(".checkpoints/*")) == []
    [run] = repository.runs()
    assert run.info.status == "FINISHED"
    assert repository.steps(run, "monitor_loss") == list(range(1, 9))


@pytest.mark.pipeline
def test_under_dvc_the_checkpoint_stays_until_dvc_has_the_model(tmp_path: Path) -> None:
    """A stage that is run again goes on from it, in the same run; evaluate runs when DVC has the outputs of train."""
    repository = Repository.create_with_data(tmp_path)
    under_dvc = {"DVC_ROOT": str(tmp_path)}
    assert run_stage(repository, "train", **under_dvc).returncode == 0
    first = outputs(repository)
    for path in tmp_path.glob("models/*.safetensors"):
        path.unlink()  # as DVC does before it runs a stage again
    again = run_stage(repository, "train", **under_dvc)
    assert again.returncode == 0, again.stdout
    assert "Going on after epoch 2" in again.stdout
    assert outputs(repository) == first
    [run] = repository.runs()
    assert (run.info.status, repository.steps(run)) == ("FINISHED", [1, 2])
    assert len(repository.client.search_logged_models([run.info.experiment_id])) == 1
    assert run_stage(repository, "evaluate", **under_dvc).returncode == 0
    assert list(tmp_path.glob(".checkpoints/*")) == []


DIE_AFTER_TRAINING = """
import os, signal
from dvc.cli import main
from dvc.stage import Stage
Stage.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
main(["repro"])
"""


@pytest.mark.pipeline
@pytest.mark.thorough
def test_if_dvc_is_killed_while_it_takes_the_model_the_training_is_one_run_of_all_its_epochs(
    trained: Repository, tmp_path: Path
) -> None:
    repository = trained.copy(tmp_path / "repository")
    repository.set_param("epochs", 3)
    before = len(repository.runs())
    killed = repository.run(sys.executable, "-c", DIE_AFTER_TRAINING)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    again = repository.dvc("repro")
    assert again.returncode == 0, again.stdout
    assert "Going on after epoch 3" in again.stdout
    run, *others = repository.runs()
    assert len(others) == before
    assert (run.info.status, repository.steps(run)) == ("FINISHED", [1, 2, 3])
    assert len(run.outputs.model_outputs) == 1
    assert run.data.tags["backfilled"] == "none"
    assert list(repository.root.glob(".checkpoints/*")) == []
    assert not re.search(r"(?m)^\?\? (.*/)?\.", repository.run("git", "status", "--porcelain").stdout)


@pytest.mark.pipeline
@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_closes_the_run_as_killed_and_the_next_start_goes_on(
    tmp_path: Path, uninterrupted: list[bytes], number: signal.Signals
) -> None:
    repository = workspace(tmp_path)
    process = start_stage(repository)
    said = interrupt_after_an_epoch(process, number, delay=0)
    assert process.returncode != 0
    assert "Traceback" not in said
    assert [run.info.status for run in repository.runs()] == ["KILLED"]
    assert repository.stage("train").returncode == 0
    assert outputs(repository) == uninterrupted
    assert [run.info.status for run in repository.runs()] == ["FINISHED"]
