"""A fingerprint stands for all that a stage reads, and for nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mnist_pipeline.params import load_params
from mnist_pipeline.provenance import Provenance, environment, trace

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
SECTIONS = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["train"]["params"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(DATA, tmp_path / "data/raw")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(repository: Path) -> None:
        text = (repository / path).read_text(encoding="utf-8")
        assert old in text
        (repository / path).write_text(text.replace(old, new), encoding="utf-8")

    return change


def traced() -> Provenance:
    params = load_params()
    return trace("train", {name: getattr(params, name) for name in SECTIONS})


def alter_a_pixel(repository: Path) -> None:
    path = repository / "data/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize(
    "change",
    [
        edit("params.yaml", "epochs: 14", "epochs: 15"),
        edit("params.yaml", "seed: 0", "seed: 1"),
        edit("params.yaml", "gamma: 0.5", "gamma: 0.25"),
        edit("stages/train.py", "Train the network", "Train a network"),
        edit("src/mnist_pipeline/training.py", "model.train()", "model.train(True)"),
        edit("dvc.yaml", "python stages/train.py", "python -O stages/train.py"),
        alter_a_pixel,
    ],
)
def test_a_change_of_what_training_reads_changes_its_fingerprint(
    repository: Path, change: Callable[[Path], None]
) -> None:
    before = traced().fingerprint
    assert traced().fingerprint == before
    change(repository)
    assert traced().fingerprint != before


@pytest.mark.parametrize(
    "change",
    [
        edit("params.yaml", "gallery_size: 60", "gallery_size: 6"),
        edit("params.yaml", "# adam, adamw or sgd", "# the optimizer"),
        edit("stages/report.py", "Write the report", "Write a report"),
        edit("src/mnist_pipeline/reporting.py", "The report", "A report"),
    ],
)
def test_a_change_of_what_training_does_not_read_leaves_its_fingerprint(
    repository: Path, change: Callable[[Path], None]
) -> None:
    before = traced().fingerprint
    change(repository)
    assert traced().fingerprint == before


def test_outside_a_repository_the_commit_is_said_to_be_missing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    assert environment()["git_commit"].startswith("none")
    assert environment()["git_dirty"] == "false"
