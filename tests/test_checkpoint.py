"""An interrupted training goes on where it was and ends as if nothing had happened."""

import os
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
from mlflow import MlflowClient
from mlflow.entities import Run

from mnist_pipeline.checkpoint import Checkpoint
from mnist_pipeline.data import FILES, load_digits
from mnist_pipeline.model import build_model
from mnist_pipeline.params import Params, TrainParams
from mnist_pipeline.training import Training, start_training, train

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return Checkpoint("f" * 64)


def shrunk(params: Params, optimizer: str) -> TrainParams:
    scheduler = params.train.scheduler.model_copy(update={"step_size": 2})
    update = {"epochs": 4, "batch_size": 64, "optimizer": optimizer, "scheduler": scheduler}
    return params.train.model_copy(update=update)


def start(params: Params, train_params: TrainParams) -> Training:
    return start_training(build_model(params.model, seed=3), train_params)


def run_epochs(training: Training, params: Params, train_params: TrainParams, epochs: int) -> None:
    digits, monitor = (load_digits(DATA, part).tensors(params.data, CPU) for part in ("train", "test"))
    for result in train(training, digits, monitor, train_params, seed=3):
        if result.epoch == epochs:
            break


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("interrupted_after", [1, 2, 3])
def test_a_training_that_goes_on_ends_like_one_that_was_never_interrupted(
    params: Params, checkpoint: Checkpoint, optimizer: str, interrupted_after: int
) -> None:
    train_params = shrunk(params, optimizer)
    whole = start(params, train_params)
    run_epochs(whole, params, train_params, 4)

    first = start(params, train_params)
    run_epochs(first, params, train_params, interrupted_after)
    checkpoint.save(first, "a run")
    second = start(params, train_params)
    assert checkpoint.restore(second) == "a run"
    run_epochs(second, params, train_params, 4)

    assert second.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


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


class Workspace:
    """A copy of the pipeline with five hundred digits, in which the train stage runs for eight epochs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("src", "stages"):
            shutil.copytree(ROOT / name, root / name)
        shutil.copy(ROOT / "dvc.yaml", root)
        (root / "data/raw").mkdir(parents=True)
        for name in FILES:
            shutil.copy(DATA / name, root / "data/raw")
        params = (ROOT / "params.yaml").read_text(encoding="utf-8")
        for key, value in {"threads": 1, "epochs": 8, "batch_size": 32}.items():
            params = re.sub(rf"(?m)^( *{key}:) +\S+", rf"\1 {value}", params, count=1)
        (root / "params.yaml").write_text(params, encoding="utf-8")

    def start(self) -> "subprocess.Popen[str]":
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
        return subprocess.Popen(
            [sys.executable, "stages/train.py"],
            cwd=self.root,
            env=kept | {"PYTHONPATH": "src"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def outputs(self) -> list[bytes]:
        return [(self.root / name).read_bytes() for name in ("models/model.safetensors", "reports/history.csv")]

    def runs(self) -> list[Run]:
        return list(self.client.search_runs([self.client.get_experiment_by_name("mnist").experiment_id]))

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{self.root / 'mlflow.db'}")


def interrupt_after_an_epoch(process: "subprocess.Popen[str]", number: signal.Signals, delay: float) -> str:
    """Send a signal some time after the first whole epoch, and return what the process said."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("Epoch: "):
            time.sleep(delay)
            process.send_signal(number)
            break
    said += process.stdout.read()
    process.wait()
    return said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    workspace = Workspace(tmp_path_factory.mktemp("uninterrupted"))
    assert workspace.start().wait() == 0
    return workspace.outputs()


@pytest.mark.pipeline
def test_a_training_killed_five_times_ends_with_the_same_bytes_in_one_run(
    tmp_path: Path, uninterrupted: list[bytes]
) -> None:
    workspace = Workspace(tmp_path)
    moments = random.Random(7)
    for _ in range(5):
        interrupt_after_an_epoch(workspace.start(), signal.SIGKILL, moments.uniform(0, 0.3))
        assert list(tmp_path.glob("models/*")) == []
    last = workspace.start()
    said = last.communicate()[0]
    assert last.returncode == 0, said
    assert "Going on after epoch" in said
    assert workspace.outputs() == uninterrupted
    assert list(tmp_path.glob(".checkpoints/*")) == []
    [run] = workspace.runs()
    assert run.info.status == "FINISHED"
    history = workspace.client.get_metric_history(run.info.run_id, "monitor_loss")
    assert {point.step for point in history} == set(range(1, 9))


@pytest.mark.pipeline
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_closes_the_run_as_killed_and_the_next_start_goes_on(
    tmp_path: Path, uninterrupted: list[bytes], number: signal.Signals
) -> None:
    workspace = Workspace(tmp_path)
    process = workspace.start()
    said = interrupt_after_an_epoch(process, number, delay=0)
    assert process.returncode != 0
    assert "Traceback" not in said
    assert [run.info.status for run in workspace.runs()] == ["KILLED"]
    assert workspace.start().wait() == 0
    assert workspace.outputs() == uninterrupted
    assert [run.info.status for run in workspace.runs()] == ["FINISHED"]
