"""A stage's fingerprint stands for everything that the stage reads, and for nothing else."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import DATA, ROOT
from support.working_tree import append, edit, write

from mnist_pipeline.common.files import sha256
from mnist_pipeline.tracking.provenance import clean_environment, describe_machine, trace


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(DATA, tmp_path / "data/raw")
    (tmp_path / "data/added").mkdir()
    (tmp_path / "reports/studies").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def alter_a_pixel(repository: Path) -> None:
    path = repository / "data/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize(
    "change",
    [
        edit("params.yaml", "epochs: 14", "epochs: 15"),
        edit("params.yaml", "seed: 0", "seed: 1"),
        edit("params.yaml", "gamma: 0.5", "gamma: 0.25"),
        append("stages/train.py"),
        append("src/mnist_pipeline/training/loop.py"),
        edit("dvc.yaml", "python stages/train.py", "python -O stages/train.py"),
        alter_a_pixel,
        write("data/added/mine/train-labels-idx1-ubyte"),
    ],
)
def test_a_change_of_what_training_reads_changes_its_fingerprint(
    repository: Path, change: Callable[[Path], None]
) -> None:
    before = trace("train").fingerprint
    assert trace("train").fingerprint == before
    change(repository)
    assert trace("train").fingerprint != before


@pytest.mark.parametrize("change", [alter_a_pixel, write("data/added/mine/train-labels-idx1-ubyte")])
def test_a_change_of_the_data_changes_their_digest(repository: Path, change: Callable[[Path], None]) -> None:
    before = trace("train").data_sha256
    edit("params.yaml", "epochs: 14", "epochs: 15")(repository)
    append("stages/train.py")(repository)
    assert trace("train").data_sha256 == before
    change(repository)
    assert trace("train").data_sha256 != before


@pytest.mark.parametrize(
    "change",
    [
        edit("params.yaml", "gallery_size: 60", "gallery_size: 6"),
        append("params.yaml"),
        append("stages/report.py"),
        append("src/mnist_pipeline/report/document.py"),
    ],
)
def test_a_change_of_what_training_does_not_read_leaves_its_fingerprint(
    repository: Path, change: Callable[[Path], None]
) -> None:
    before = trace("train").fingerprint
    change(repository)
    assert trace("train").fingerprint == before


@pytest.mark.usefixtures("repository")
def test_the_params_of_a_stage_are_those_that_it_declares_under_their_names_in_the_file() -> None:
    assert trace("train").params == {
        "seed": 0,
        "threads": 2,
        "data.validation_size": 0,
        "data.mean": 0.1307,
        "data.std": 0.3081,
        "data.max_class_ratio": 2.0,
        "data.classes": [str(digit) for digit in range(10)],
        "model.network": "convolutional",
        "model.channels": [6, 10, 16, 18, 32, 24],
        "model.bias": True,
        "model.activation": "relu",
        "model.pooling": 2,
        "model.dropout": 0.25,
        "model.dropout_kind": "element",
        "model.parameter_budget": 20000,
        "train.processes": 1,
        "train.epochs": 14,
        "train.batch_size": 129,
        "train.optimizer": "adam",
        "train.learning_rate": 0.001,
        "train.momentum": 0.9,
        "train.weight_decay": 0.0001,
        "train.label_smoothing": 0.0,
        "train.averaging": 0.0,
        "train.scheduler.kind": "step",
        "train.scheduler.step_size": 5,
        "train.scheduler.gamma": 0.5,
        "train.scheduler.warm_up": 0.3,
        "train.augmentation.rotation": 0.0,
        "train.augmentation.shift": 0.0,
        "train.augmentation.scale": 0.0,
        "train.augmentation.shear": 0.0,
        "train.augmentation.clean_epochs": 0,
    }


def test_the_digest_of_an_input_is_that_of_the_file_or_of_the_directorys_list(repository: Path) -> None:
    inputs = trace("train").inputs
    digest = subprocess.run("sha256sum * | sha256sum", shell=True, cwd=DATA, capture_output=True, text=True, check=True)
    assert inputs["data/raw"] == digest.stdout.split()[0]
    assert inputs["stages/train.py"] == sha256(repository / "stages/train.py")


@pytest.mark.parametrize(
    ("stage", "outputs", "metrics"),
    [
        ("train", ["models/model.safetensors", "reports/history.csv"], []),
        (
            "evaluate",
            ["reports/metrics.json", *(f"reports/{name}.csv" for name in ("predictions", "calibration", "robustness"))],
            ["reports/metrics.json"],
        ),
        ("report", ["reports/report.html", "reports/report.md", "reports/figures"], []),
    ],
)
def test_the_outputs_of_a_stage_are_those_that_it_declares(
    repository: Path, stage: str, outputs: list[str], metrics: list[str]
) -> None:
    written = ("history.csv", "metrics.json", "predictions.csv", "calibration.csv", "robustness.csv")
    for path in ("models/model.safetensors", *(f"reports/{name}" for name in written)):
        write(path)(repository)
    assert (trace(stage).outputs, trace(stage).metrics) == (outputs, metrics)


def test_the_machine_is_described() -> None:
    found = describe_machine()
    assert found.keys() == {"python", "torch", "mlflow", "processor", "kernels"}
    assert all(found.values())


def test_a_clean_environment_knows_nothing_of_dvc_and_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("MNIST_DIR", "/data")
    kept = clean_environment()
    assert [name for name in kept if name.startswith(("DVC_", "MLFLOW_"))] == []
    assert kept["MNIST_DIR"] == "/data"
