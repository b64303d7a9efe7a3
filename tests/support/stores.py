"""A tracking store of a test's own, and what a training and its test would log there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import mlflow
import pytest
from mlflow.entities import Run

from mnist_pipeline.common.files import sha256_of_directory
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import FIGURES, HISTORY, METRICS, MODEL
from mnist_pipeline.common.scores import EpochResult, Score
from mnist_pipeline.tracking.provenance import Provenance
from support import DATA, ROOT
from support.repository import Repository, empty_database

PARAMS = load_params(ROOT / "params.yaml")
_RAW = {"data/raw": sha256_of_directory(DATA)}
TRAIN = Provenance(
    "train",
    "python stages/train.py",
    {"seed": 0, "threads": 1, "train.learning_rate": 0.001, "train.optimizer": "adam"},
    _RAW | {"stages/train.py": "1" * 64},
    [str(MODEL), str(HISTORY)],
    [],
)
EVALUATE = Provenance(
    "evaluate",
    "python stages/evaluate.py",
    {"seed": 0, "threads": 2, "evaluate.batch_size": 1000},
    _RAW | {str(MODEL): "2" * 64},
    [str(METRICS), str(FIGURES)],
    [str(METRICS)],
)
EPOCHS = [
    EpochResult(1, 0.001, Score(0.5, 250, 300), Score(0.25, 190, 200), 0.0005),
    EpochResult(2, 0.0005, Score(0.25, 280, 300), Score(0.125, 195, 200), 0.0005),
]
TESTED = {
    "test_accuracy": 0.985,
    "test_loss": 0.05,
    "test_total": 200,
    "test_misclassified": 3,
    "test_calibration_error": 0.0125,
    "test_per_class_accuracy": {"3": 0.75},
    "parameters": 19_210,
}
FOREIGN = ("DVC_", "GIT_", "MLFLOW_EXPERIMENT", "MLFLOW_RUN", "MLFLOW_TRACKING", "MNIST_")


@contextmanager
def isolated_tracking(root: Path) -> Iterator[pytest.MonkeyPatch]:
    """Track into the database at a root, which may be there, and into no other; then restore environment and MLflow."""
    if not (root / "mlflow.db").exists():
        (root / "mlflow.db").write_bytes(empty_database())
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            del os.environ[name]
        os.environ["GIT_CEILING_DIRECTORIES"] = str(root.parent)
        mlflow.set_tracking_uri(None)
        patch.chdir(root)
        yield patch
    mlflow.set_tracking_uri(None)


def points(repository: Repository, run: Run) -> dict[str, int]:
    """Count the points of each of a run's metrics."""
    return {metric: len(repository.steps(run, metric)) for metric in run.data.metrics}


def artifacts(run: Run) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://"))


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Repository]:
    with isolated_tracking(tmp_path):
        yield Repository(tmp_path)
