"""The store: which one it is, what it finds, what happens when it fails, and its database."""

import os
import re
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.cli import cli as mlflow_command
from support.repository import Repository, empty_database
from support.stores import TRAIN, isolated_tracking, store  # noqa: F401 (a fixture)

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256, write_text
from mnist_pipeline.common.paths import MODEL
from mnist_pipeline.tracking.database import prepare_database
from mnist_pipeline.tracking.run import MODEL_TAG
from mnist_pipeline.tracking.store import (
    Store,
    StoreError,
    continue_untracked,
    finished_runs,
    store_errors,
)


@pytest.mark.parametrize("named", [True, False], ids=["MLFLOW_TRACKING_URI", "no name"])
def test_the_store_is_the_named_one_or_the_one_in_the_repository(
    store: Repository, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    shutil.copy("mlflow.db", "named.db")
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.root / 'named.db'}")
    run = Store().begin_run(TRAIN)
    used = store.root / ("named.db" if named else "mlflow.db")
    assert MlflowClient(f"sqlite:///{used}").get_run(run.id).data.tags["stage"] == "train"


@pytest.fixture
def artifact(store: Repository) -> tuple[str, Path]:
    """Return the id of a run, and the file that it logged."""
    run = Store().begin_run(TRAIN)
    run.client.log_text(run.id, "kept", "note.txt")
    return run.id, store.root / "mlartifacts" / run.id / "artifacts/note.txt"


@pytest.mark.parametrize("bring", [shutil.move, shutil.copytree])
@pytest.mark.parametrize("name", ["repository", "50% of Zoë's #1"])
def test_runs_follow_a_directory_that_is_moved_or_copied(
    store: Repository,
    artifact: tuple[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    bring: Callable[[Path, Path], object],
    name: str,
) -> None:
    run_id, logged = artifact
    place = tmp_path_factory.mktemp("elsewhere") / name
    before = (store.root / "mlflow.db").read_bytes()
    bring(store.root, place)
    with isolated_tracking(place):
        found = Store()
        [run] = found.search_runs(f"attributes.run_id = '{run_id}'")
        assert run.info.artifact_uri == (place / logged.relative_to(store.root).parent).as_uri()
        assert Path(found.client.download_artifacts(run_id, "note.txt")).read_text() == "kept"
        assert found.unfinished_run_of(TRAIN) is not None
        new = found.begin_run(TRAIN)
        new.client.log_text(new.id, "new", "note.txt")
    assert (place / "mlartifacts" / new.id / "artifacts/note.txt").read_text() == "new"
    if bring is shutil.move:
        assert not store.root.exists()
    else:
        assert (store.root / "mlflow.db").read_bytes() == before
        assert not (store.root / "mlartifacts" / new.id).exists()


@pytest.mark.parametrize("name", ["what?", "a%41", "x?uri=true", os.fsdecode(b"caf\xe9")])
def test_a_directory_whose_name_mlflow_misreads_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = tmp_path / name / "repository"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    with mock.patch.dict(os.environ, MLFLOW_TRACKING_URI=""), pytest.raises(UserError, match="rename the directory"):
        Store()
    assert list(tmp_path.rglob("*")) == [place.parent, place]


@pytest.mark.parametrize("name", ["50% of it", 'it\'s a "test" #1', "Zoë & 猫", "$HOME;[x]{y}*", "a\\b\nc"])
def test_any_other_name_of_a_directory_is_fine(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.mkdir()
    with isolated_tracking(place):
        run = Store().begin_run(TRAIN)
        run.client.log_text(run.id, "kept", "note.txt")
        assert Path(run.client.download_artifacts(run.id, "note.txt")).read_text() == "kept"
    assert (place / "mlartifacts" / run.id / "artifacts/note.txt").is_file()
    assert [path for path in tmp_path.iterdir() if path != place] == []


@pytest.mark.parametrize("location", ["s3://bucket/mlartifacts", "/elsewhere/artifacts", "mlflow-artifacts:/1"])
def test_artifacts_that_lie_elsewhere_stay_there(store: Repository, location: str) -> None:
    client = MlflowClient(f"sqlite:///{store.root / 'mlflow.db'}")
    client.create_experiment("mnist", location)
    Store()
    assert client.get_experiment_by_name("mnist").artifact_location == location


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, 3), ({"DVC_EXP_NAME": "a"}, 1), ({"DVC_EXP_NAME": "b"}, 2), ({"DVC_EXP_NAME": "c"}, None)],
)
@pytest.mark.usefixtures("store")
def test_a_model_belongs_to_its_newest_run_in_the_same_dvc_experiment(
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
            run = Store().begin_run(TRAIN)
            run.log(tags={MODEL_TAG: digest})
            ids.append(run.id)
    with mock.patch.dict(os.environ, environment):
        of_model = Store().run_of(MODEL)
    assert (of_model and ids.index(of_model.id)) == found


@pytest.mark.usefixtures("store")
def test_finished_runs_are_flat_and_oldest_first() -> None:
    for status, loss in [("FINISHED", 0.5), ("FAILED", 0.4), ("FINISHED", 0.25)]:
        run = Store().begin_run(TRAIN)
        run.log({"train_loss": 1.0}, {"seed": 0}, step=1)
        run.log({"train_loss": loss}, step=2)
        run.close(status)
    assert finished_runs("params.seed = '0'") == [
        {"params.seed": "0", "metrics.train_loss": loss} for loss in (0.5, 0.25)
    ]
    assert finished_runs("params.seed = '1'") == []


def test_a_deleted_experiment_is_brought_back_by_the_command_that_the_error_names(
    store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Store().begin_run(TRAIN)
    store.client.delete_experiment(Store().experiment_id)
    deleted = r"the experiment mnist was deleted: `(mlflow [^`]+)` brings it back"
    with pytest.raises(StoreError, match=deleted) as failed, store_errors():
        Store()
    command = shlex.split(str(failed.value).split("`")[1])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert CliRunner().invoke(mlflow_command, command[1:]).exit_code == 0
    assert Store().client.get_run(run.id).data.tags["stage"] == "train"


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
        "warning: MLflow at postgresql://host failed (disk full), so the report is not tracked: "
        "`make backfill` adds it when MLflow works again\n"
    )


def test_a_failure_of_the_store_is_an_error_if_tracking_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "required")
    with (
        pytest.raises(UserError, match=r"^MLflow at .* \(disk full\).* the report .* is required$"),
        continue_untracked("the report"),
    ):
        raise RuntimeError("disk full")
    assert capsys.readouterr().err == ""


def test_an_unknown_choice_is_refused_before_anything_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_TRACKING", "never")
    with pytest.raises(UserError, match=r"optional or required.*'never'"), continue_untracked("the report"):
        pass


@pytest.mark.parametrize("choice", ["optional", "required"])
@pytest.mark.parametrize("error", [UserError("a mistake"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_other_errors_pass_unchanged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: str, error: BaseException
) -> None:
    monkeypatch.setenv("MNIST_TRACKING", choice)
    with pytest.raises(type(error)) as raised, continue_untracked("the report"):
        raise error
    assert raised.value is error
    assert capsys.readouterr().err == ""


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
    with pytest.raises(StoreError) as raised, store_errors():
        raise RuntimeError(message)
    assert re.fullmatch(r"MLflow at .* failed \((.*)\)", str(raised.value))[1] == said


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
    with pytest.raises(StoreError) as raised, store_errors():
        raise RuntimeError(message)
    said = str(raised.value)
    assert version("mlflow") in said
    assert "`mlflow db upgrade sqlite:///mlflow.db`" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("content", [b"no database " * 99, b"SQLite format 3\0" + b"no" * 999])
def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(sqlite3.Error, match="database"):
        prepare_database(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == content


def test_an_existing_database_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database())
    prepare_database(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == empty_database()


def test_a_database_is_created_whatever_an_interrupted_process_left(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    (tmp_path / "mlflow.db.new").write_bytes(empty_database()[:8192])
    prepare_database(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_experiment_by_name("Default") is not None


def test_a_database_is_created_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: MlflowClient) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(MlflowClient, "search_experiments", fail)
    with pytest.raises(ConnectionError):
        prepare_database(tmp_path / "mlflow.db")
    assert list(tmp_path.iterdir()) == []
