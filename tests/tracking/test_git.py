"""What git says: the commit, whether the tree is dirty, a run's title, and the patch of what is not committed."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT
from support.working_tree import append, edit, git, write

from mnist_pipeline.tracking.git import TITLE_LENGTH, commit_tags, run_title, uncommitted_patch


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("params.yaml", "stages/train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("src", "models", "reports"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


@pytest.fixture
def committed(directory: Path) -> Path:
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "Begin")
    return directory


SEED = edit("params.yaml", "seed: 0", "seed: 1")
EPOCHS = edit("params.yaml", "epochs: 14", "epochs: 5")


@pytest.mark.parametrize("commands", [[], [["init", "--quiet"]]], ids=["no repository", "no commit yet"])
@pytest.mark.usefixtures("directory")
def test_without_a_commit_there_is_no_patch_and_tags_and_title_say_so(commands: list[list[str]]) -> None:
    for command in commands:
        git(*command)
    assert commit_tags()["git_commit"].startswith("none")
    assert commit_tags()["git_dirty"] == "unknown"
    assert uncommitted_patch() == ""
    assert run_title() == "no commit"


def test_without_git_the_tags_say_that_there_is_no_commit(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(committed))
    assert commit_tags()["git_commit"].startswith("none")
    assert commit_tags()["git_dirty"] == "unknown"


@pytest.mark.usefixtures("committed")
def test_a_tree_like_its_commit_is_clean() -> None:
    assert commit_tags() == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": "false"}
    assert uncommitted_patch() == ""


@pytest.mark.parametrize("path", ["models/model.safetensors", "reports/metrics.json", "dvc.lock"])
def test_new_or_changed_outputs_leave_the_tree_clean(committed: Path, path: str) -> None:
    write(path)(committed)
    assert commit_tags()["git_dirty"] == "false"
    git("add", "--all")
    git("commit", "--quiet", "--message", "Keep")
    edit(path, "written", "altered")(committed)
    assert commit_tags()["git_dirty"] == "false"
    assert uncommitted_patch() == ""


@pytest.mark.parametrize("change", [edit("params.yaml", "seed: 0", "seed: 1"), write("src/new.py")])
def test_any_other_difference_makes_the_tree_dirty(committed: Path, change: Callable[[Path], None]) -> None:
    change(committed)
    assert commit_tags()["git_dirty"] == "true"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], []),
        ([write("models/model.safetensors"), write("reports/metrics.json"), write("dvc.lock")], []),
        ([SEED], ["seed=1"]),
        ([EPOCHS, SEED], ["seed=1", "train.epochs=5"]),
        ([SEED, write("src/new.py")], ["seed=1"]),
        ([write("src/new.py")], ["changed"]),
        ([append("params.yaml")], ["changed"]),
    ],
    ids=["nothing", "outputs", "a param", "two params", "a param and a file", "a file", "a comment"],
)
def test_a_title_names_the_commit_and_what_differs_from_it(
    committed: Path, changes: list[Callable[[Path], None]], expected: list[str]
) -> None:
    for change in changes:
        change(committed)
    assert run_title() == " ".join([git("rev-parse", "HEAD")[:7], *expected])


@pytest.mark.parametrize("content", ["seed: [", "seed 0", ""], ids=["no YAML", "no mapping", "nothing"])
def test_a_title_does_not_need_valid_params_in_the_commit(committed: Path, content: str) -> None:
    params = (committed / "params.yaml").read_text(encoding="utf-8")
    (committed / "params.yaml").write_text(content)
    git("commit", "--quiet", "--all", "--message", "Break")
    (committed / "params.yaml").write_text(params, encoding="utf-8")
    assert run_title() == f"{git('rev-parse', 'HEAD')[:7]} changed"


def test_a_title_with_many_params_is_cut(committed: Path) -> None:
    path = committed / "params.yaml"
    path.write_text(
        re.sub(r"(?m)^( *(?!pooling)\w+: +\d+)(?=\s|$)", r"\g<1>1", path.read_text(encoding="utf-8")), encoding="utf-8"
    )
    assert run_title().endswith(" …")
    assert len(run_title()) <= TITLE_LENGTH


def test_the_patch_turns_the_commit_into_the_edited_tree(committed: Path) -> None:
    edit("params.yaml", "seed: 0", "seed: 1")(committed)
    append("stages/train.py")(committed)
    write("src/new.py")(committed)
    patch = uncommitted_patch()
    edited = {path: (committed / path).read_bytes() for path in ("params.yaml", "stages/train.py", "src/new.py")}
    git("stash", "--quiet", "--include-untracked")
    subprocess.run(["git", "apply"], input=patch, text=True, check=True)
    assert {path: (committed / path).read_bytes() for path in edited} == edited


@pytest.mark.parametrize("content", [b"a\nb\n\n", b"caf\xe9\n"], ids=["a blank line at the end", "no UTF-8"])
def test_any_text_can_be_in_a_patch(committed: Path, content: bytes) -> None:
    (committed / "notes.txt").write_bytes(content)
    git("add", "notes.txt")
    git("commit", "--quiet", "--message", "Note")
    (committed / "notes.txt").write_bytes(b"A" + content)
    patch = uncommitted_patch()
    assert patch.endswith("\n")
    assert "+++ b/notes.txt" in patch
    if content.isascii():  # else the bytes that are no text are replaced
        subprocess.run(["git", "apply", "--reverse", "--check"], input=patch, text=True, check=True)
