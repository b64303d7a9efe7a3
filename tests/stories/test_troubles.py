"""Troubles around the pipeline: each is reported in one line and leaves no half-written file."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.entities import Run
from support import ROOT
from support.in_process import run_stage
from support.repository import Repository

pytestmark = pytest.mark.pipeline

OUTPUTS = ["models/model.safetensors", "reports/history.csv"]
NOTHING: list[str] = []


@dataclass(frozen=True)
class Step:
    """How a stage ended, and the files that were there then, hidden ones too."""

    process: "subprocess.CompletedProcess[str]"
    written: list[str]

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def said(self) -> str:
        return self.process.stdout

    def lines(self, kind: str) -> list[str]:
        return re.findall(rf"(?m)^{kind}: .*$", self.said)


def train(repository: Repository, in_process: bool = True, **variables: str) -> Step:
    stage = run_stage if in_process else Repository.stage
    process = stage(repository, "train", PYTHONDONTWRITEBYTECODE="1", **variables)
    files = [path for name in ("models", "reports", ".checkpoints") for path in (repository.root / name).rglob("*")]
    return Step(
        process,
        sorted(str(path.relative_to(repository.root)) for path in files if path.is_file() and path.name != ".gitkeep"),
    )


# Git that changes line endings


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.autocrlf=input", "core.eol=crlf"])
def test_a_clone_has_the_same_bytes_whatever_git_does_with_line_endings(
    trained: Repository, tmp_path: Path, setting: str
) -> None:
    clone = tmp_path / "clone"
    trained.run("git", "clone", "--quiet", "-c", setting, ".", str(clone)).check_returncode()
    files = trained.run("git", "ls-files").stdout.splitlines()
    assert {"dvc.lock", "reports/history.csv", "reports/figures/loss.png", "stages/train.py"} < set(files)
    changed = [file for file in files if (clone / file).read_bytes() != (trained.root / file).read_bytes()]
    assert changed == []
    assert Repository(clone).run("git", "status", "--porcelain").stdout == ""


# Terminals that cannot show everything, and environments that lack something


def run_program(body: str, *redirections: str, options: tuple[str, ...] = (), **variables: str) -> Step:
    """Run an expression as a program of ours, and print its value."""
    program = "import getpass, sys, warnings; from mnist_pipeline.common.errors import run"
    command = [sys.executable, *options, "-c", f"{program}; run(lambda: print({body}))"]
    environment = {name: value for name, value in os.environ.items() if name not in ("LNAME", "LOGNAME", "USER")}
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {" ".join(redirections)}', "sh", *command],
        env=environment | {"PYTHONPATH": str(ROOT / "src")} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="latin-1",
        check=False,
    )
    return Step(ended, NOTHING)


@pytest.mark.parametrize(
    ("encoding", "said"), [("latin-1", r"Zoë \u2192"), ("ascii", r"Zo\xeb \u2192"), ("utf-8", "ZoÃ« â\x86\x92")]
)
def test_a_character_that_the_terminal_lacks_ends_no_program(encoding: str, said: str) -> None:
    ended = run_program("'Zoë →'", PYTHONIOENCODING=encoding)
    assert (ended.code, ended.said) == (0, f"{said}\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_ends_no_program(closed: str) -> None:
    assert run_program("sys.stderr.isatty()", closed).code == 0


def test_a_user_without_a_name_gets_one_for_dvc(tmp_path: Path) -> None:
    nobody = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    (tmp_path / "sitecustomize.py").write_text(nobody)
    ended = run_program("getpass.getuser()", PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{tmp_path}")
    assert (ended.code, ended.said) == (0, "unknown\n")


def test_a_warning_of_a_library_is_no_error() -> None:
    ended = run_program("warnings.warn('deprecated', DeprecationWarning)", PYTHONWARNINGS="error")
    assert ended.code == 0
    assert "DeprecationWarning: deprecated" in ended.said


def test_python_without_docstrings_is_refused_in_one_line() -> None:
    for ended in (run_program("1", PYTHONOPTIMIZE="2"), run_program("1", options=("-OO",))):
        assert (ended.code, len(ended.said.splitlines())) == (1, 1)
        assert ended.said.startswith("error: with PYTHONOPTIMIZE=2")


# Without git, as from a source archive


@dataclass(frozen=True)
class Exported:
    """What `make repro` says without git, twice, and the runs."""

    repository: Repository
    steps: list["subprocess.CompletedProcess[str]"]
    runs: list[Run]

    def executed(self, index: int) -> list[str]:
        return re.findall(r"Running stage '(\w+)'", self.steps[index].stdout)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    repository = Repository.create(tmp_path_factory.mktemp("exported"))
    repro = ("make", "--old-file=setup", "repro")  # everything that setup would install is installed
    steps = [repository.run(*repro), repository.run(*repro)]
    return Exported(repository, steps, repository.runs())


@pytest.mark.thorough
def test_without_git_all_stages_run(exported: Exported) -> None:
    assert exported.steps[0].returncode == 0, exported.steps[0].stdout
    assert exported.executed(0) == ["download", "train", "evaluate", "report"]


@pytest.mark.thorough
def test_without_git_nothing_runs_twice(exported: Exported) -> None:
    assert exported.steps[1].returncode == 0, exported.steps[1].stdout
    assert exported.executed(1) == []
    assert "Added" not in exported.steps[1].stdout


@pytest.mark.thorough
def test_without_git_the_run_has_no_commit(exported: Exported) -> None:
    check_no_commit(exported.runs)


def check_no_commit(runs: list[Run]) -> None:
    assert runs[0].data.tags["git_commit"].startswith("none")
    assert runs[0].data.tags["git_dirty"] == "unknown"


@pytest.mark.thorough
def test_a_copy_without_git_runs_no_stage_again_and_tracks_a_training_without_a_commit(
    trained: Repository, tmp_path: Path
) -> None:
    copy = trained.copy(tmp_path / "repository")
    shutil.rmtree(copy.root / ".git")
    ended = copy.run("make", "--old-file=setup", "repro")
    assert ended.returncode == 0, ended.stdout
    assert not re.search("Running stage|Added", ended.stdout)
    assert train(copy).code == 0
    check_no_commit(copy.runs())


# Databases that MLflow cannot use


def with_schema(revision: str) -> Callable[[Path], None]:
    """Return a function that gives a database another revision of MLflow's schema."""

    def change(database: Path) -> None:
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))

    return change


SCHEMA = "the database's schema is not that of MLflow"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "older": (with_schema("75868b020152"), SCHEMA),
    "newer": (with_schema("f" * 12), SCHEMA),
    "text": (lambda database: database.write_text("no database " * 200), "is no SQLite database: move it away"),
}


@dataclass(frozen=True)
class Unusable:
    """What the train stage does with a database that MLflow cannot use, with and without required tracking."""

    cause: str
    required: Step
    optional: Step
    untouched: bool


@pytest.fixture(scope="module", params=DAMAGES)
def unusable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Unusable:
    damage, cause = DAMAGES[request.param]
    repository = Repository.create_with_data(tmp_path_factory.mktemp(request.param))
    mine = repository.root / "mlflow.db"
    damage(mine)
    before = mine.read_bytes()
    required, optional = train(repository, MNIST_TRACKING="required"), train(repository)
    return Unusable(cause, required, optional, untouched=mine.read_bytes() == before)


def test_without_its_database_the_training_goes_on(unusable: Unusable) -> None:
    assert unusable.optional.code == 0
    assert unusable.optional.written == OUTPUTS
    assert "Epoch: 2/2" in unusable.optional.said


def test_one_line_says_why_the_training_is_not_tracked(unusable: Unusable) -> None:
    [warning] = unusable.optional.lines("warning")
    assert warning.startswith("warning: MLflow at sqlite:///")
    assert unusable.cause in warning
    assert "mlflow.db" in warning
    assert not re.search("error: |Traceback", unusable.optional.said)


def test_without_its_database_a_training_that_must_be_tracked_does_not_start(unusable: Unusable) -> None:
    assert unusable.required.code == 1
    assert unusable.required.written == NOTHING
    [error] = unusable.required.said.splitlines()
    assert error.startswith("error: MLflow at sqlite:///")
    assert unusable.cause in error


def test_the_unusable_database_is_not_changed(unusable: Unusable) -> None:
    assert unusable.untouched


# Disks that take no more


def test_a_full_disk_ends_the_training_with_a_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    repository = Repository.create_with_data(tmp_path)
    monkeypatch.setattr(os, "fsync", fill_up)
    ended = train(repository)
    assert ended.code == 1
    [error] = ended.lines("error")
    assert re.fullmatch(r"error: \[Errno \d+\] No space left on device: '.*'", error)
    assert "Traceback" not in ended.said
    assert ended.written == NOTHING


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """Mount a small disk of its own."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root on Linux mounts a disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, left: int) -> None:
    """Fill a disk up to that many free bytes."""
    (disk / "filler").unlink(missing_ok=True)
    state = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - left)


@dataclass(frozen=True)
class Disks:
    """What the train stage does on a disk that cannot be written, is full, half full, and roomy again."""

    steps: dict[str, Step]
    kept: Repository  # a copy of the database: MLflow would keep the original open, and the disk busy


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    """Train on each, one after the other."""
    place = tmp_path_factory.mktemp("disks")
    steps = {}
    with mounted(place / "disk", "16m") as disk:
        repository = Repository.create_with_data(disk / "repository", fresh=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        steps["read-only"] = train(repository, in_process=False)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        fill(disk, 0)
        steps["full"] = train(repository, in_process=False)
        for name in ("models", "reports", ".checkpoints"):  # from here on, only the database lacks room
            shutil.rmtree(repository.root / name, ignore_errors=True)
            (place / name).mkdir()
            (repository.root / name).symlink_to(place / name)
        fill(disk, 600_000)
        steps["half full"] = train(repository, in_process=False)
        (disk / "filler").unlink()
        steps["roomy"] = train(repository, in_process=False)
        shutil.copy(repository.root / "mlflow.db", place)
        yield Disks(steps, Repository(place))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "cause"), [("read-only", "Read-only file system"), ("full", "No space left on device")]
)
def test_a_disk_that_takes_nothing_ends_the_training_with_a_line_that_names_the_file(
    disks: Disks, name: str, cause: str
) -> None:
    assert disks.steps[name].code == 1
    [error] = disks.steps[name].lines("error")
    assert re.fullmatch(rf"error: \[Errno \d+\] {cause}: '\.checkpoints/\w+\.safetensors'", error)
    assert "Traceback" not in disks.steps[name].said


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["read-only", "full"])
def test_a_disk_that_takes_nothing_gets_no_part_of_a_file(disks: Disks, name: str) -> None:
    assert disks.steps[name].written == NOTHING


@pytest.mark.thorough
def test_a_disk_too_small_for_the_database_costs_no_training(disks: Disks) -> None:
    assert disks.steps["half full"].code == 0, disks.steps["half full"].said
    [warning] = disks.steps["half full"].lines("warning")
    assert "database or disk is full" in warning
    assert disks.steps["half full"].written == OUTPUTS


@pytest.mark.thorough
def test_with_room_again_the_training_is_tracked_again(disks: Disks) -> None:
    assert disks.steps["roomy"].code == 0
    assert disks.steps["roomy"].lines("warning") == []
    run = disks.kept.runs()[0]
    assert run.info.status == "FINISHED"
    assert "model_sha256" in run.data.tags


# Two at once, in one repository


@dataclass(frozen=True)
class TwoAtOnce:
    """A `dvc repro` that trains, a second one at the same time, and how the first goes on and is interrupted."""

    first: "subprocess.Popen[str]"
    second: "subprocess.CompletedProcess[str]"
    went_on: bool
    last: str
    runs: list[Run]


@pytest.fixture(scope="module")
def two_at_once(exported: Exported) -> Iterator[TwoAtOnce]:
    repository = exported.repository
    repository.set_param("epochs", 9999)
    first = subprocess.Popen(
        ["dvc", "repro"],
        cwd=repository.root,
        env=repository.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # as a terminal does, to interrupt DVC and the stage at once
    )
    try:
        assert first.stdout is not None
        assert any(line.startswith("Epoch: 1/") for line in first.stdout)
        second = repository.dvc("repro")
        went_on = first.poll() is None
        os.killpg(first.pid, signal.SIGINT)
        last, _ = first.communicate(timeout=60)
        yield TwoAtOnce(first, second, went_on, last, repository.runs())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()


@pytest.mark.thorough
def test_a_second_repro_names_the_first_and_ends(two_at_once: TwoAtOnce) -> None:
    assert two_at_once.second.returncode != 0
    assert re.search(rf"\(PID {two_at_once.first.pid}\): \S*dvc repro", two_at_once.second.stdout)
    assert not re.search("Running stage|Traceback", two_at_once.second.stdout)


@pytest.mark.thorough
def test_the_first_repro_goes_on(two_at_once: TwoAtOnce) -> None:
    assert two_at_once.went_on
    assert re.search(r"(?m)^Epoch: \d+/9999 ", two_at_once.last)


@pytest.mark.thorough
def test_an_interrupted_repro_leaves_nothing_running(two_at_once: TwoAtOnce) -> None:
    assert two_at_once.first.returncode != 0
    assert "\ninterrupted\n" in two_at_once.last
    assert "Traceback" not in two_at_once.last
    assert two_at_once.runs[0].info.status == "KILLED"
    with pytest.raises(ProcessLookupError):
        os.killpg(two_at_once.first.pid, 0)
