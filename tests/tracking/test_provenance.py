"""A fingerprint stands for all that a stage reads, and for nothing else; the commit is named as git knows it."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import DATA, ROOT

from mnist_pipeline.common.files import sha256
from mnist_pipeline.tracking.provenance import (
    TITLE_LENGTH,
    clean_environment,
    commit,
    environment,
    title,
    trace,
    uncommitted,
)


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


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def committed(repository: Path) -> Path:
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "Begin")
    return repository


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(repository: Path) -> None:
        text = (repository / path).read_text(encoding="utf-8")
        assert old in text
        (repository / path).write_text(text.replace(old, new), encoding="utf-8")

    return change


def write(path: str) -> Callable[[Path], None]:
    def change(repository: Path) -> None:
        (repository / path).parent.mkdir(exist_ok=True)
        (repository / path).write_text("written")

    return change


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
    edit("stages/train.py", "Train the network", "Train a network")(repository)
    assert trace("train").data_sha256 == before
    change(repository)
    assert trace("train").data_sha256 != before


@pytest.mark.parametrize(
    "change",
    [
        edit("params.yaml", "gallery_size: 60", "gallery_size: 6"),
        edit("params.yaml", "# adam, adamw, muon or sgd", "# the optimizer"),
        edit("stages/report.py", "Write the report", "Write a report"),
        edit("src/mnist_pipeline/reporting.py", "The report", "A report"),
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
        "train.precision": "float32",
        "train.optimizer": "adam",
        "train.learning_rate": 0.001,
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


@pytest.mark.parametrize("commands", [[], [["init", "--quiet"]]], ids=["no repository", "no commit yet"])
@pytest.mark.usefixtures("repository")
def test_without_a_commit_it_is_said_to_be_missing(commands: list[list[str]]) -> None:
    for command in commands:
        git(*command)
    assert commit()["git_commit"].startswith("none")
    assert commit()["git_dirty"] == "unknown"
    assert uncommitted() == ""


def test_where_git_is_not_installed_the_commit_is_said_to_be_missing(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(committed))
    assert commit()["git_commit"].startswith("none")
    assert commit()["git_dirty"] == "unknown"


@pytest.mark.usefixtures("committed")
def test_a_tree_like_its_commit_is_clean() -> None:
    assert commit() == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": "false"}
    assert uncommitted() == ""


@pytest.mark.parametrize("path", ["models/model.safetensors", "reports/metrics.json", "dvc.lock"])
def test_outputs_new_or_altered_leave_the_tree_clean(committed: Path, path: str) -> None:
    write(path)(committed)
    assert commit()["git_dirty"] == "false"
    git("add", "--all")
    git("commit", "--quiet", "--message", "Keep")
    edit(path, "written", "altered")(committed)
    assert commit()["git_dirty"] == "false"
    assert uncommitted() == ""


@pytest.mark.parametrize("change", [edit("params.yaml", "seed: 0", "seed: 1"), write("src/new.py")])
def test_whatever_else_differs_from_the_commit_makes_the_tree_dirty(
    committed: Path, change: Callable[[Path], None]
) -> None:
    change(committed)
    assert commit()["git_dirty"] == "true"


@pytest.mark.parametrize("commands", [[], [["init", "--quiet"]]], ids=["no repository", "no commit yet"])
@pytest.mark.usefixtures("repository")
def test_a_title_without_a_commit_says_so(commands: list[list[str]]) -> None:
    for command in commands:
        git(*command)
    assert title() == "no commit"


SEED = edit("params.yaml", "seed: 0", "seed: 1")
EPOCHS = edit("params.yaml", "epochs: 14", "epochs: 5")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], []),
        ([write("models/model.safetensors"), write("reports/metrics.json"), write("dvc.lock")], []),
        ([SEED], ["seed=1"]),
        ([EPOCHS, SEED], ["seed=1", "train.epochs=5"]),
        ([SEED, write("src/new.py")], ["seed=1"]),
        ([write("src/new.py")], ["changed"]),
        ([edit("params.yaml", "# adam, adamw, muon or sgd", "# the optimizer")], ["changed"]),
    ],
    ids=["nothing", "outputs", "a param", "two params", "a param and a file", "a file", "a comment"],
)
def test_a_title_names_the_commit_and_what_differs_from_it(
    committed: Path, changes: list[Callable[[Path], None]], expected: list[str]
) -> None:
    for change in changes:
        change(committed)
    assert title() == " ".join([git("rev-parse", "HEAD")[:7], *expected])


@pytest.mark.parametrize("content", ["seed: [", "seed 0", ""], ids=["no YAML", "no mapping", "nothing"])
def test_a_title_does_not_need_the_commits_params(committed: Path, content: str) -> None:
    params = (committed / "params.yaml").read_text(encoding="utf-8")
    (committed / "params.yaml").write_text(content)
    git("commit", "--quiet", "--all", "--message", "Break")
    (committed / "params.yaml").write_text(params, encoding="utf-8")
    assert title() == f"{git('rev-parse', 'HEAD')[:7]} changed"


def test_a_title_of_many_params_is_cut(committed: Path) -> None:
    path = committed / "params.yaml"
    path.write_text(
        re.sub(r"(?m)^( *(?!pooling)\w+: +\d+)(?=\s|$)", r"\g<1>1", path.read_text(encoding="utf-8")), encoding="utf-8"
    )
    assert title().endswith(" …")
    assert len(title()) <= TITLE_LENGTH


def test_the_patch_makes_the_edited_tree_of_the_commit(committed: Path) -> None:
    edit("params.yaml", "seed: 0", "seed: 1")(committed)
    edit("stages/train.py", "Train the network", "Train a network")(committed)
    write("src/new.py")(committed)
    patch = uncommitted()
    edited = {path: (committed / path).read_bytes() for path in ("params.yaml", "stages/train.py", "src/new.py")}
    git("stash", "--quiet", "--include-untracked")
    subprocess.run(["git", "apply"], input=patch, text=True, check=True)
    assert {path: (committed / path).read_bytes() for path in edited} == edited


@pytest.mark.parametrize("content", [b"a\nb\n\n", b"caf\xe9\n"], ids=["a blank line at the end", "no UTF-8"])
def test_a_patch_is_made_of_any_text(committed: Path, content: bytes) -> None:
    (committed / "notes.txt").write_bytes(content)
    git("add", "notes.txt")
    git("commit", "--quiet", "--message", "Note")
    (committed / "notes.txt").write_bytes(b"A" + content)
    patch = uncommitted()
    assert patch.endswith("\n")
    assert "+++ b/notes.txt" in patch
    if content.isascii():  # else the bytes that are no text are replaced
        subprocess.run(["git", "apply", "--reverse", "--check"], input=patch, text=True, check=True)


def test_the_machine_is_described() -> None:
    assert environment().keys() == {"python", "torch", "mlflow", "processor"}
    assert all(environment().values())


def test_a_clean_environment_knows_nothing_of_dvc_and_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("MNIST_DIR", "/data")
    kept = clean_environment()
    assert [name for name in kept if name.startswith(("DVC_", "MLFLOW_"))] == []
    assert kept["MNIST_DIR"] == "/data"
