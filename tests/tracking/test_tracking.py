"""The tracking: one run for a training, found again by its model, whole or, when the store fails, without harm."""

import contextlib
import io
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from support import DATA, ROOT
from support.repository import Repository, empty_database
from support.stores import EPOCHS, TESTED, artifacts, files_in, isolated_tracking, points

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256, sha256_of_directory, write_csv, write_json, write_text
from mnist_pipeline.common.params import flatten, load_params
from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.data.training_set import load_training_data
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model, save_model
from mnist_pipeline.model.network import Net, build_model
from mnist_pipeline.tracking.provenance import Provenance
from mnist_pipeline.tracking.run import MODEL_TAG
from mnist_pipeline.tracking.store import Store, continue_untracked, explain, finished_runs, prepare
from mnist_pipeline.tracking.training_run import training_run
from mnist_pipeline.training.loop import Training, start_training

NONE = DATA / "absent"  # no additions
PARAMS = load_params(ROOT / "params.yaml")
MODEL = Path("models/model.safetensors")
HISTORY = Path("reports/history.csv")
METRICS = Path("reports/metrics.json")
FIGURES = Path("reports/figures")
RAW = {"data/raw": sha256_of_directory(DATA)}
TRAIN = Provenance(
    "train",
    "python stages/train.py",
    {"seed": 0, "threads": 1, "train.learning_rate": 0.001, "train.optimizer": "adam"},
    RAW | {"stages/train.py": "1" * 64},
    [str(MODEL), str(HISTORY)],
    [],
)
EVALUATE = Provenance(
    "evaluate",
    "python stages/evaluate.py",
    {"seed": 0, "threads": 2, "evaluate.batch_size": 1000},
    RAW | {str(MODEL): "2" * 64},
    [str(METRICS), str(FIGURES)],
    [str(METRICS)],
)


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def training_after(epochs: Sequence[EpochResult] = ()) -> Training:
    training = start_training(build_model(PARAMS.model, seed=0), PARAMS.train)
    training.history.extend(epochs)
    return training


@dataclass(frozen=True)
class Scenario:
    """What a training, a later stage in an edited tree, and a stage without a run leave behind."""

    store: Repository
    copy: Path
    parts: dict[str, Digits]
    run: Run
    count: int
    printed: str
    model: Net

    @property
    def logged_model(self) -> Path:
        [directory] = self.store.root.glob("mlartifacts/models/*/artifacts")
        return directory


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    """Work in a copy of a repository, as `dvc exp run --temp` does."""
    store, copy = Repository(tmp_path_factory.mktemp("root")), tmp_path_factory.mktemp("copy")
    (copy / "code.py").write_text("committed\n")
    shutil.copy(ROOT / "params.yaml", copy)
    git(copy, "init", "--quiet")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "Begin")
    parts = load_training_data(DATA, NONE, PARAMS.data.model_copy(update={"validation_size": 50}), seed=0)
    training = training_after()
    with isolated_tracking(store.root) as patch:
        patch.chdir(copy)
        patch.setenv("DVC_ROOT", str(store.root))
        with training_run(TRAIN, parts, training, None) as tracked:
            for result in EPOCHS:
                tracked.log_epoch(result)
            write_csv(HISTORY, [result.row() for result in EPOCHS])
            save_model(training.model, MODEL, PARAMS.model, PARAMS.data)
            tracked.log_model(training.model, MODEL, example=torch.randn(2, 1, 28, 28))

        (copy / "code.py").write_text("edited\n")
        write_json(METRICS, TESTED)
        write_text(FIGURES / "curves.png", "made up")
        parts["test"] = load_digits(DATA, "test")
        Store().add_to_run_of(MODEL, EVALUATE, {"test": parts["test"]})

        write_text(Path("models/unknown"), "of no run")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            Store().add_to_run_of(Path("models/unknown"), EVALUATE)
        [run] = store.runs()
        yield Scenario(store, copy, parts, run, len(store.runs()), printed.getvalue(), load_model(MODEL))


def test_a_run_has_the_params_of_its_stages_under_their_names(scenario: Scenario) -> None:
    assert scenario.run.data.params == {
        "seed": "0",
        "threads": "1",
        "train.learning_rate": "0.001",
        "train.optimizer": "adam",
        "evaluate.batch_size": "1000",
    }


def test_a_param_that_a_later_stage_had_otherwise_stands_among_the_tags(scenario: Scenario) -> None:
    assert scenario.run.data.tags["threads"] == "2"
    assert "seed" not in scenario.run.data.tags


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
    history = scenario.store.client.get_metric_history(scenario.run.info.run_id, metric)
    assert [(point.step, point.value) for point in history] == list(enumerate(values, start=1))


def test_a_run_has_the_parameter_count_and_how_long_an_epoch_took(scenario: Scenario) -> None:
    assert scenario.run.data.metrics["parameters"] == 19_210
    assert 0 <= scenario.run.data.metrics["epoch_seconds"] < 60


def test_later_stages_add_metrics_under_their_names_in_the_file(scenario: Scenario) -> None:
    found = {name: value for name, value in scenario.run.data.metrics.items() if name.startswith("test")}
    assert found == {name: value for name, value in flatten(TESTED).items() if name != "parameters"}


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("stage", "train"),
        ("command", TRAIN.command),
        ("fingerprint", TRAIN.fingerprint),
        ("params_sha256", TRAIN.params_sha256),
        ("data_sha256", TRAIN.data_sha256),
        ("git_dirty", "false"),
        ("backfilled", "false"),
        ("python", platform.python_version()),
        ("torch", version("torch")),
        ("mlflow", version("mlflow")),
        ("evaluate.command", EVALUATE.command),
        ("evaluate.fingerprint", EVALUATE.fingerprint),
        ("evaluate.params_sha256", EVALUATE.params_sha256),
        ("evaluate.git_dirty", "true"),
        ("evaluate.backfilled", "false"),
    ],
)
def test_a_run_says_where_it_comes_from(scenario: Scenario, tag: str, value: str) -> None:
    assert scenario.run.data.tags[tag] == value


def test_a_run_names_the_commit_the_place_the_model_and_the_processor(scenario: Scenario) -> None:
    tags = scenario.run.data.tags
    assert tags["git_commit"] == tags["evaluate.git_commit"] == git(scenario.copy, "rev-parse", "HEAD")
    assert tags["workspace"] == f"{platform.node()}:{scenario.store.root}"
    assert tags["model_sha256"] == sha256(scenario.copy / MODEL)
    assert tags["processor"]
    assert "dvc_experiment" not in tags


@pytest.mark.parametrize(("use", "images"), [("train", 250), ("monitor", 50), ("test", 200)])
def test_a_run_names_the_images_that_it_used(scenario: Scenario, use: str, images: int) -> None:
    [dataset] = [found.dataset for found in scenario.run.inputs.dataset_inputs if found.tags[0].value == use]
    digest = scenario.parts[use].sha256()
    assert dataset.digest == digest[:36]
    assert json.loads(dataset.profile) == {
        "num_rows": images,
        "per_class": scenario.parts[use].per_class(),
        "sha256": digest,
    }


def test_each_dataset_is_named_for_its_use_alone(scenario: Scenario) -> None:
    tags = [[(tag.key, tag.value) for tag in found.tags] for found in scenario.run.inputs.dataset_inputs]
    assert sorted(tags) == [[("mlflow.data.context", use)] for use in ("monitor", "test", "train")]


def test_a_run_keeps_the_outputs_under_their_own_paths_and_a_patch_of_the_edited_tree_alone(scenario: Scenario) -> None:
    outputs = {str(MODEL), str(HISTORY), str(METRICS), str(FIGURES / "curves.png")}
    of_stages = {f"provenance/{name}" for name in ("train.json", "evaluate.json", "evaluate.patch")}
    assert files_in(artifacts(scenario.run)) == outputs | of_stages
    for output in outputs:
        assert (artifacts(scenario.run) / output).read_bytes() == (scenario.copy / output).read_bytes()


@pytest.mark.parametrize("provenance", [TRAIN, EVALUATE], ids=lambda provenance: provenance.stage)
def test_a_run_keeps_the_digest_of_each_input(scenario: Scenario, provenance: Provenance) -> None:
    kept = (artifacts(scenario.run) / f"provenance/{provenance.stage}.json").read_text(encoding="utf-8")
    assert json.loads(kept) == asdict(provenance)


def test_the_patch_says_what_was_edited(scenario: Scenario) -> None:
    patch = (artifacts(scenario.run) / "provenance/evaluate.patch").read_text(encoding="utf-8")
    assert patch.endswith("-committed\n+edited\n")


def test_a_model_that_no_run_trained_is_said_and_not_logged(scenario: Scenario) -> None:
    assert "models/unknown" in scenario.printed
    assert len(scenario.printed.splitlines()) == 1
    assert scenario.count == 1


def test_all_is_kept_at_the_root_that_dvc_names(scenario: Scenario) -> None:
    assert {path.name for path in scenario.store.root.iterdir()} - {"mlflow.db.lock"} == {"mlflow.db", "mlartifacts"}
    assert {path.name for path in scenario.copy.iterdir()} == {".git", "code.py", "params.yaml", "models", "reports"}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_logged_model_predicts_as_the_weights_do(scenario: Scenario, count: int) -> None:
    images = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))
    predicted = mlflow.pyfunc.load_model(str(scenario.logged_model)).predict(images.numpy())
    assert torch.allclose(torch.as_tensor(predicted), predict(scenario.model, images, count), atol=1e-5)


def test_the_logged_model_is_the_runs(scenario: Scenario) -> None:
    [logged] = scenario.store.client.search_logged_models([scenario.run.info.experiment_id])
    assert logged.source_run_id == scenario.run.info.run_id
    assert logged.name == "model"


def test_the_logged_model_is_no_pickle(scenario: Scenario) -> None:
    files = [file for file in scenario.logged_model.rglob("*") if file.is_file()]
    members = [name for file in files if zipfile.is_zipfile(file) for name in zipfile.ZipFile(file).namelist()]
    assert any("weight" in name for name in members)
    assert [name for name in members if name.endswith((".pkl", ".pickle"))] == []
    assert [file for file in files if file.read_bytes().startswith(b"\x80")] == []  # how each pickle begins


# Each of these has a store of its own


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Repository]:
    with isolated_tracking(tmp_path):
        yield Repository(tmp_path)


@pytest.mark.parametrize("named", [True, False], ids=["MLFLOW_TRACKING_URI", "no name"])
def test_without_dvc_the_store_is_the_named_one_or_else_at_hand(
    store: Repository, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    shutil.copy("mlflow.db", "named.db")
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.root / 'named.db'}")
    with training_run(TRAIN, {}, training_after(), None) as tracked:
        pass
    used = store.root / ("named.db" if named else "mlflow.db")
    assert MlflowClient(f"sqlite:///{used}").get_run(tracked.id).info.status == "FINISHED"


@pytest.mark.parametrize("named", [True, False], ids=["MLFLOW_TRACKING_URI", "no name"])
def test_no_database_but_our_own_is_touched(store: Repository, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    shutil.copy("mlflow.db", "named.db")
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.root / 'named.db'}")
    opened = Store()
    os.utime("mlflow.db", (0, 0))
    opened.touch()
    assert (Path("mlflow.db").stat().st_mtime == 0) == named


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_says_how_its_training_ended(store: Repository, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), training_run(TRAIN, {}, training_after(), None):
        raise error
    assert [run.info.status for run in store.runs()] == [status]
    with training_run(TRAIN, {}, training_after(), None):
        assert store.runs()[0].info.status == "RUNNING"
    assert store.runs()[0].info.status == "FINISHED"


def test_an_interrupted_run_goes_on_with_the_epochs_that_it_lacks(store: Repository) -> None:
    with contextlib.suppress(KeyboardInterrupt), training_run(TRAIN, {}, training_after(), None) as first:
        first.log_epoch(EPOCHS[0])
        raise KeyboardInterrupt  # after the second epoch's checkpoint, before it is logged
    with training_run(TRAIN, {}, training_after(EPOCHS), first.id) as second:
        assert [run.info.status for run in store.runs()] == ["RUNNING"]
    [run] = store.runs()
    assert run.info.run_id == first.id == second.id
    assert run.info.status == "FINISHED"
    assert store.steps(run) == [1, 2]
    assert set(points(store, run).items()) >= {("monitor_loss", 2), ("learning_rate", 2), ("parameters", 1)}


@pytest.mark.parametrize("fate", ["lost", "deleted"])
def test_a_run_that_is_gone_begins_anew_with_the_epochs_behind_it(store: Repository, fate: str) -> None:
    gone = "0" * 32
    if fate == "deleted":
        with training_run(TRAIN, {}, training_after(), None) as tracked:
            gone = str(tracked.id)
        store.client.delete_run(gone)
    with training_run(TRAIN, {}, training_after(EPOCHS), gone):
        pass
    [run] = store.runs()
    assert run.info.run_id != gone
    assert store.steps(run) == [1, 2]


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, 3), ({"DVC_EXP_NAME": "a"}, 1), ({"DVC_EXP_NAME": "b"}, 2), ({"DVC_EXP_NAME": "c"}, None)],
)
@pytest.mark.usefixtures("store")
def test_a_model_belongs_to_the_newest_run_that_trained_it_and_in_an_experiment_to_one_of_its_own(
    environment: dict[str, str], found: int | None
) -> None:
    write_text(MODEL, "weights")
    ids = []
    for begun_in, digest in [
        ({"DVC_EXP_NAME": "a"}, sha256(MODEL)),
        ({"DVC_EXP_NAME": "a"}, sha256(MODEL)),
        ({"DVC_EXP_NAME": "b"}, sha256(MODEL)),
        ({}, sha256(MODEL)),
        ({"DVC_EXP_NAME": "a"}, "0" * 64),
    ]:
        with mock.patch.dict(os.environ, begun_in):
            ids.append(Store().begin_run(TRAIN, {MODEL_TAG: digest}).id)
    with mock.patch.dict(os.environ, environment):
        run = Store().run_of(MODEL)
    assert (run and ids.index(run.id)) == found


def test_a_run_bears_the_name_of_the_commit(scenario: Scenario) -> None:
    assert scenario.run.info.run_name == git(scenario.copy, "rev-parse", "HEAD")[:7]


def test_a_run_is_described_by_what_its_test_found(scenario: Scenario) -> None:
    assert scenario.run.data.tags["mlflow.note.content"] == (
        "**98.50%** of 200 test images right, 3 wrong. Loss 0.0500, calibration error 1.25%, 19,210 parameters."
    )


def test_a_run_bears_the_name_of_its_experiment(store: Repository) -> None:
    with mock.patch.dict(os.environ, DVC_EXP_NAME="trial"):
        Store().begin_run(TRAIN, {})
    [run] = store.runs()
    assert run.info.run_name == run.data.tags["dvc_experiment"] == "trial"


@pytest.mark.usefixtures("store")
def test_a_run_has_a_later_stage_once_it_was_added_from_the_same_inputs() -> None:
    write_json(METRICS, TESTED)
    write_text(FIGURES / "curves.png", "made up")
    run = Store().begin_run(TRAIN, {})
    assert not run.has(EVALUATE)
    run.add(EVALUATE)
    assert run.has(EVALUATE)
    assert not run.has(replace(EVALUATE, inputs={str(MODEL): "3" * 64}))
    assert not run.has(replace(EVALUATE, stage="report"))


@pytest.mark.usefixtures("store")
def test_a_stage_that_was_not_added_whole_is_missing() -> None:
    run = Store().begin_run(TRAIN, {})
    write_json(METRICS, TESTED)
    with pytest.raises(FileNotFoundError):
        run.add(EVALUATE)  # there are no figures
    assert not run.has(EVALUATE)


@pytest.mark.usefixtures("store")
def test_finished_runs_are_flat_and_the_oldest_comes_first() -> None:
    for status, loss in [("FINISHED", 0.5), ("FAILED", 0.4), ("FINISHED", 0.25)]:
        run = Store().begin_run(TRAIN, {})
        run.log({"train_loss": 1.0}, {"seed": 0}, step=1)
        run.log({"train_loss": loss}, step=2)
        run.end(status)
    assert finished_runs("params.seed = '0'") == [
        {"params.seed": "0", "metrics.train_loss": loss} for loss in (0.5, 0.25)
    ]
    assert finished_runs("params.seed = '1'") == []


# A store that fails


def test_a_failure_of_the_store_is_one_line_of_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MNIST_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/runs")
    with continue_untracked("the report"):
        raise RuntimeError("disk full. Or not\nand so on")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "warning: MLflow at postgresql://host/runs failed (disk full), so the report is not tracked: "
        "`make backfill` adds it when MLflow works again\n"
    )


def test_a_failure_of_the_store_is_an_error_where_tracking_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "required")
    with (
        pytest.raises(UserError, match=r"^MLflow at .* \(disk full\).* the report .* is required$"),
        continue_untracked("the report"),
    ):
        raise RuntimeError("disk full")
    assert capsys.readouterr().err == ""


def test_a_choice_that_there_is_not_is_refused_before_anything_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "never")
    with pytest.raises(UserError, match=r"optional or required.*'never'"), continue_untracked("the report"):
        pass


@pytest.mark.parametrize("choice", ["optional", "required"])
@pytest.mark.parametrize("error", [UserError("a mistake"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_what_is_no_failure_of_the_store_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: str, error: BaseException
) -> None:
    monkeypatch.setenv("MNIST_TRACKING", choice)
    with pytest.raises(type(error)) as raised, continue_untracked("the report"):
        raise error
    assert raised.value is error
    assert capsys.readouterr().err == ""


def fail(*_: object, **__: object) -> None:
    raise ConnectionError("no answer")


def test_a_training_goes_on_silently_after_one_warning(
    store: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with training_run(TRAIN, {}, training_after(), None) as tracked:
        tracked.log_epoch(EPOCHS[0])
        [begun] = store.runs()
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        tracked.log_epoch(EPOCHS[1])
        monkeypatch.undo()
        tracked.log_epoch(EPOCHS[1])
        tracked.log_model(Net(PARAMS.model), MODEL, torch.zeros(2, 1, 28, 28))
    [line] = capsys.readouterr().err.splitlines()
    assert "(no answer), so this training after epoch 1 is not tracked" in line
    assert tracked.id == begun.info.run_id
    [run] = store.runs()
    assert store.steps(run) == [1]
    assert run.info.status == "RUNNING"


@pytest.mark.parametrize("interrupted", [None, "0" * 32])
@pytest.mark.usefixtures("store")
def test_a_training_whose_run_cannot_begin_keeps_the_id_that_it_had(
    capsys: pytest.CaptureFixture[str], interrupted: str | None
) -> None:
    Path("mlflow.db").write_text("no database " * 99)
    with training_run(TRAIN, {}, training_after(), interrupted) as tracked:
        tracked.log_epoch(EPOCHS[0])
    [line] = capsys.readouterr().err.splitlines()
    assert "mlflow.db is no SQLite database: move it away, and a new one is made), so this training is not" in line
    assert tracked.id == interrupted


@pytest.mark.usefixtures("store")
def test_a_training_ends_where_tracking_is_required_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "required")
    with training_run(TRAIN, {}, training_after(), None) as tracked:
        tracked.log_epoch(EPOCHS[0])
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        with pytest.raises(UserError, match="after epoch 1"):
            tracked.log_epoch(EPOCHS[1])


@pytest.mark.parametrize("content", [b"no database " * 99, b"SQLite format 3\0" + b"no" * 999])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(sqlite3.Error, match="database"):
        prepare(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == content


def test_a_database_is_writable_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database())
    prepare(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == empty_database()


@pytest.mark.parametrize("left", ["", "mlflow.db", "mlflow.db.new"], ids=["nothing", "an empty file", "a part"])
def test_a_database_is_made_whatever_an_interrupted_process_left(tmp_path: Path, left: str) -> None:
    if left:
        (tmp_path / left).write_bytes(empty_database()[:8192] if left.endswith("new") else b"")
    prepare(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_experiment_by_name("Default") is not None


def test_a_database_that_cannot_be_made_whole_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlflowClient, "search_experiments", fail)
    with pytest.raises(ConnectionError):
        prepare(tmp_path / "mlflow.db")
    assert list(tmp_path.iterdir()) == []


REQUEST = "API request to http://localhost:5000/api/2.0/mlflow/runs/log-batch failed with exception "
GIVEN_UP = f"{REQUEST}HTTPConnectionPool(host='localhost', port=5000): Max retries exceeded with url: /api (Caused by "


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            f"""{GIVEN_UP}NewConnectionError("HTTPConnection(host='localhost', port=5000): Failed to establish a new """
            """connection: [Errno 111] Connection refused"))""",
            "Failed to establish a new connection: [Errno 111] Connection refused",
        ),
        (
            f"""{GIVEN_UP}ReadTimeoutError("HTTPConnectionPool(host='localhost', port=5000): Read timed out. """
            """(read timeout=6)"))""",
            "Read timed out. (read timeout=6)",
        ),
        (f"{GIVEN_UP}ResponseError('too many 503 error responses'))", "too many 503 error responses"),
        (
            "(sqlite3.OperationalError) database is locked\n[SQL: INSERT INTO runs]\n",
            "(sqlite3.OperationalError) database is locked",
        ),
        (
            f"{GIVEN_UP}ConnectTimeoutError(<HTTPConnection(host='h', port=1) at 0x7f>, 'Connection to h timed out.'))",
            "Connection to h timed out.",
        ),
        (
            f"{GIVEN_UP}ProtocolError('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer')))",
            "Connection reset by peer",
        ),
        ("Run '1' not found. Is it another store's?", "Run '1' not found"),
        ("\n\nline one\nline two", "line one"),
        ("", "RuntimeError"),
        (" \n", "RuntimeError"),
    ],
)
def test_a_failure_is_explained_in_a_phrase(message: str, said: str) -> None:
    assert explain(RuntimeError(message)) == said


@pytest.mark.parametrize(
    "message",
    [
        "Detected out-of-date database schema (found version 0, but expected 1). Take a backup of your database, then "
        "run 'mlflow db upgrade <database_uri>'\nto migrate your database to the latest schema.",
        "Can't locate revision identified by '0123456789ab'",
    ],
)
def test_a_database_of_another_mlflow_is_explained_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    said = explain(RuntimeError(message))
    assert version("mlflow") in said
    assert "`mlflow db upgrade sqlite:///mlflow.db`" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("method", ["log_batch", "log_inputs"], ids=["an epoch", "the start"])
def test_a_signal_in_the_midst_of_a_request_closes_the_run_as_killed(
    store: Repository, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def train() -> None:
        with training_run(TRAIN, {}, training_after(), None) as tracked:
            monkeypatch.setattr(MlflowClient, method, interrupt)
            tracked.log_epoch(EPOCHS[0])

    if method == "log_inputs":
        monkeypatch.setattr(MlflowClient, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.undo()
    assert [run.info.status for run in store.runs()] == ["KILLED"]


def test_what_stops_a_training_is_not_hidden_by_a_store_that_fails_too(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "required")
    monkeypatch.setattr(MlflowClient, "set_terminated", fail)
    with pytest.raises(KeyboardInterrupt), training_run(TRAIN, {}, training_after(), None):
        raise KeyboardInterrupt


def test_a_param_that_a_rerun_sets_back_is_not_contradicted_by_a_tag(store: Repository) -> None:
    write_json(METRICS, TESTED)
    write_text(FIGURES / "curves.png", "made up")
    run = Store().begin_run(TRAIN, {})
    for size in (1000, 500, 1000):
        run.add(replace(EVALUATE, params={"evaluate.batch_size": size}))
    [found] = store.runs()
    assert found.data.params["evaluate.batch_size"] == "1000"
    assert found.data.tags["evaluate.batch_size"] == "1000"


def test_the_test_images_are_named_even_where_they_monitored_the_training(store: Repository) -> None:
    run = Store().begin_run(TRAIN, {})
    run.log_datasets(load_training_data(DATA, NONE, PARAMS.data, seed=0))
    run.log_datasets({"test": load_digits(DATA, "test")})
    [found] = store.runs()
    assert {used.tags[0].value for used in found.inputs.dataset_inputs} == {"train", "monitor", "test"}
