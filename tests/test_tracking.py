"""The tracking: one run for a training, found again by its model, with a model that anyone can load."""

import contextlib
import io
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from mnist_pipeline.files import sha256_of_directory
from mnist_pipeline.inference import Score, predict
from mnist_pipeline.model import Net, build_model, load_model, save_model
from mnist_pipeline.params import load_params
from mnist_pipeline.provenance import Provenance
from mnist_pipeline.tracking import add_to_run_of, training_run
from mnist_pipeline.training import EpochResult, Training, start_training

DATA = Path(__file__).parent / "data"
PARAMS = load_params(Path(__file__).parents[1] / "params.yaml")
MODEL = Path("models/model.safetensors")
PROVENANCE = Provenance("train", "python stages/train.py", {"data/raw": sha256_of_directory(DATA)}, "0" * 64)
EPOCHS = [
    EpochResult(1, 0.001, Score(0.5, 250, 300), Score(0.25, 190, 200), 0.0005),
    EpochResult(2, 0.0005, Score(0.25, 280, 300), Score(0.125, 195, 200), 0.0005),
]


@contextlib.contextmanager
def tracking_alone() -> Iterator[pytest.MonkeyPatch]:
    """Clear what the environment says of tracking, and what MLflow remembers of it, before and after."""
    with pytest.MonkeyPatch.context() as patch:
        mlflow.set_tracking_uri(None)
        for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        yield patch
        mlflow.set_tracking_uri(None)
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


def client_of(database: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{database}")


def runs_in(database: Path) -> list[Run]:
    """Return the runs, the newest first."""
    client = client_of(database)
    experiment = client.get_experiment_by_name("mnist")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class Scenario:
    """What a training, the stages after it, a stage without a run, and a training that fails leave behind."""

    root: Path
    copy: Path
    run: Run
    failed: Run
    count: int
    printed: str
    model: Net

    @property
    def logged_model(self) -> Path:
        [directory] = self.root.glob("mlartifacts/models/*/artifacts")
        return directory


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    """Work in a copy of a repository, as `dvc exp run --temp` does."""
    root, copy = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("copy")
    git(copy, "init", "--quiet")
    git(copy, "commit", "--quiet", "--allow-empty", "--message", "Begin")
    (copy / "reports/figures").mkdir(parents=True)
    for name in ("metrics.json", "figures/curves.png"):
        (copy / "reports" / name).write_text("made up")
    model = build_model(PARAMS.model, seed=0)
    training = start_training(model, PARAMS.train)
    settings = {"seed": PARAMS.seed, "data": PARAMS.data, "model": PARAMS.model, "train": PARAMS.train}
    with tracking_alone() as patch:
        patch.chdir(copy)
        patch.setenv("DVC_ROOT", str(root))
        with training_run(settings, PROVENANCE, training, None) as tracked:
            for result in EPOCHS:
                tracked.log_epoch(result)
            save_model(model, MODEL, PARAMS.model, PARAMS.data)
            tracked.log_model(model, MODEL, example=torch.randn(2, 1, 28, 28))
        add_to_run_of(MODEL, {"test_accuracy": 0.985, "test_per_class_accuracy": {"3": 0.75}})
        add_to_run_of(MODEL, artifacts=[Path("reports/metrics.json"), Path("reports/figures")])
        [run] = runs_in(root / "mlflow.db")

        save_model(build_model(PARAMS.model, seed=1), Path("models/unknown"), PARAMS.model, PARAMS.data)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            add_to_run_of(Path("models/unknown"), {"test_accuracy": 0.5})
        count = len(runs_in(root / "mlflow.db"))

        with pytest.raises(RuntimeError, match="power cut"), training_run(settings, PROVENANCE, training, None):
            raise RuntimeError("power cut")
        failed = runs_in(root / "mlflow.db")[0]
        yield Scenario(root, copy, run, failed, count, printed.getvalue(), load_model(MODEL))


def test_a_run_has_the_params_under_their_names_in_the_file(scenario: Scenario) -> None:
    assert scenario.run.data.params == {
        "seed": "0",
        "data.validation_size": "0",
        "data.mean": "0.1307",
        "data.std": "0.3081",
        "model.dropout": "0.25",
        "model.dropout_kind": "element",
        "model.parameter_budget": "20000",
        "train.epochs": "14",
        "train.batch_size": "129",
        "train.optimizer": "adam",
        "train.learning_rate": "0.001",
        "train.weight_decay": "0.0001",
        "train.scheduler.step_size": "5",
        "train.scheduler.gamma": "0.5",
    }


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("learning_rate", [0.001, 0.0005]),
        ("train_loss", [0.5, 0.25]),
        ("train_accuracy", [250 / 300, 280 / 300]),
        ("monitor_loss", [0.25, 0.125]),
        ("monitor_accuracy", [0.95, 0.975]),
    ],
)
def test_a_run_has_each_epochs_metrics(scenario: Scenario, metric: str, values: list[float]) -> None:
    history = client_of(scenario.root / "mlflow.db").get_metric_history(scenario.run.info.run_id, metric)
    assert [(point.step, point.value) for point in history] == list(enumerate(values, start=1))


def test_a_run_has_the_parameter_count_and_how_long_an_epoch_took(scenario: Scenario) -> None:
    assert scenario.run.data.metrics["parameters"] == 19_210
    assert 0 <= scenario.run.data.metrics["epoch_seconds"] < 60


def test_a_run_names_the_commit(scenario: Scenario) -> None:
    assert scenario.run.data.tags["git_commit"] == git(scenario.copy, "rev-parse", "HEAD")


def test_a_run_names_the_digest_of_the_data(scenario: Scenario) -> None:
    digest = subprocess.run("sha256sum * | sha256sum", shell=True, cwd=DATA, capture_output=True, text=True, check=True)
    assert digest.stdout.split()[0] == scenario.run.data.tags["data_sha256"]


def test_a_finished_training_is_a_finished_run(scenario: Scenario) -> None:
    assert scenario.run.info.status == "FINISHED"


def test_a_training_that_fails_leaves_a_failed_run(scenario: Scenario) -> None:
    assert scenario.failed.info.run_id != scenario.run.info.run_id
    assert scenario.failed.info.status == "FAILED"


def test_later_stages_add_metrics_to_the_run_of_the_model(scenario: Scenario) -> None:
    assert scenario.run.data.metrics["test_accuracy"] == 0.985
    assert scenario.run.data.metrics["test_per_class_accuracy.3"] == 0.75


@pytest.mark.parametrize(
    ("directory", "files"),
    [("reports", {"reports/metrics.json", "reports/figures"}), ("reports/figures", {"reports/figures/curves.png"})],
)
def test_later_stages_add_files_under_their_own_paths(scenario: Scenario, directory: str, files: set[str]) -> None:
    client = client_of(scenario.root / "mlflow.db")
    assert {file.path for file in client.list_artifacts(scenario.run.info.run_id, directory)} == files


def test_a_model_that_no_run_trained_is_said_and_not_logged(scenario: Scenario) -> None:
    assert "models/unknown" in scenario.printed
    assert len(scenario.printed.splitlines()) == 1
    assert scenario.count == 1


def test_all_is_kept_at_the_root_that_dvc_names(scenario: Scenario) -> None:
    assert {path.name for path in scenario.root.iterdir()} == {"mlflow.db", "mlartifacts"}
    assert {path.name for path in scenario.copy.iterdir()} == {".git", "models", "reports"}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_logged_model_predicts_as_the_weights_do(scenario: Scenario, count: int) -> None:
    images = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))
    predicted = mlflow.pyfunc.load_model(str(scenario.logged_model)).predict(images.numpy())
    assert torch.allclose(torch.as_tensor(predicted), predict(scenario.model, images, count), atol=1e-5)


def test_the_logged_model_is_the_runs(scenario: Scenario) -> None:
    [logged] = client_of(scenario.root / "mlflow.db").search_logged_models([scenario.run.info.experiment_id])
    assert logged.source_run_id == scenario.run.info.run_id
    assert logged.name == "model"


def test_the_logged_model_is_no_pickle(scenario: Scenario) -> None:
    files = [file for file in scenario.logged_model.rglob("*") if file.is_file()]
    members = [name for file in files if zipfile.is_zipfile(file) for name in zipfile.ZipFile(file).namelist()]
    assert any("weight" in name for name in members)
    assert [name for name in members if name.endswith((".pkl", ".pickle"))] == []
    assert [file for file in files if file.read_bytes().startswith(b"\x80")] == []  # how each pickle begins


@pytest.mark.parametrize("named", [True, False], ids=["MLFLOW_TRACKING_URI", "no name"])
def test_without_dvc_the_store_is_the_named_one_or_else_at_hand(
    scenario: Scenario, tmp_path: Path, named: bool
) -> None:
    for name in ("mlflow.db", "named.db"):
        shutil.copy(scenario.root / "mlflow.db", tmp_path / name)
    before = len(runs_in(tmp_path / "mlflow.db"))
    with tracking_alone() as patch:
        patch.chdir(tmp_path)
        if named:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'named.db'}")
        with training_run({}, PROVENANCE, start_training(Net(PARAMS.model), PARAMS.train), None):
            pass
    added = {name: len(runs_in(tmp_path / name)) - before for name in ("mlflow.db", "named.db")}
    assert added == {"mlflow.db": 0 if named else 1, "named.db": 1 if named else 0}


def test_a_run_that_the_store_has_lost_begins_again_with_the_epochs_behind_it(tmp_path: Path) -> None:
    model = Net(PARAMS.model)
    started = start_training(model, PARAMS.train)
    training = Training(model, started.optimizer, started.scheduler, history=list(EPOCHS))
    with tracking_alone() as patch:
        patch.chdir(tmp_path)
        with training_run({}, PROVENANCE, training, "0" * 32):
            pass
    [run] = runs_in(tmp_path / "mlflow.db")
    points = client_of(tmp_path / "mlflow.db").get_metric_history(run.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.25)]
