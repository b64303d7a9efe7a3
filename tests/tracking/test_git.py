"""What git says: the commit, whether the tree is dirty, a run's title, and the patch of what is not committed."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT
from support.working_tree import append, edit, git, write

from mnist_pipeline.tracking.git import (
    TITLE_LENGTH,
    GitError,
    changed_files,
    clone_repository,
    commit_tags,
    head_commit_or_none,
    run_title,
    uncommitted_patch,
)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "pipeline"
    for name in ("params.yaml", "stages/train.py"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    for name in ("src", "models", "reports"):
        (directory / name).mkdir()
    (directory / "known.bin").write_bytes(b"\0\1")
    (directory / "latin-1.txt").write_bytes(b"caf\xe9\n")
    (directory / "removed.txt").write_text("removed\n")
    monkeypatch.chdir(directory)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return directory


def commit_all(directory: Path) -> None:
    git("init", "--quiet", directory=directory)
    git("add", "--all", directory=directory)
    git("commit", "--quiet", "--message", "Begin", directory=directory)


@pytest.fixture
def committed(directory: Path) -> Path:
    commit_all(directory)
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


def test_an_edit_that_changes_neither_time_nor_size_is_seen(committed: Path) -> None:
    git("config", "core.trustCtime", "false")
    written = os.stat("params.yaml")
    SEED(committed)
    os.utime("params.yaml", ns=(written.st_atime_ns, written.st_mtime_ns))
    os.utime(".git/index", ns=(written.st_mtime_ns + 10**10, written.st_mtime_ns + 10**10))
    assert changed_files() == ["params.yaml"]
    assert "+seed: 1" in uncommitted_patch()
    assert run_title().endswith("seed=1")


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


def tree(directory: Path) -> dict[str, bytes]:
    """Return the files below a directory with their content, and links with their targets."""
    paths = [
        path for path in directory.rglob("*") if ".git" not in path.parts and (path.is_file() or path.is_symlink())
    ]
    return {
        str(path.relative_to(directory)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in paths
    }


def edit_in_every_way(committed: Path) -> None:
    """Change, add and remove files of any content and name."""
    edit("params.yaml", "seed: 0", "seed: 1")(committed)
    append("stages/train.py")(committed)
    (committed / "known.bin").write_bytes(b"\0\2")
    (committed / "latin-1.txt").write_bytes(b"caf\xe9 au lait\n")
    (committed / "removed.txt").unlink()
    (committed / "src/new.py").write_text("new\n\n")
    (committed / "src/new.bin").write_bytes(b"\0\1")
    (committed / "src/empty").touch()
    (committed / 'src/*ü "quoted" #\'.py').write_text("new")
    (committed / "src/link").symlink_to("nowhere")
    (committed / "src/staged.py").write_text("staged")
    git("add", "src/staged.py", directory=committed)


@pytest.fixture
def edited(committed: Path) -> Path:
    edit_in_every_way(committed)
    return committed


def check_patch(patch: str, repository: Path, clone: Path, below: str = ".") -> None:
    """Check that the patch, applied there, makes of a clone what the repository is."""
    git("clone", "--quiet", str(repository), str(clone))
    subprocess.run(["git", "apply"], input=patch.encode(), cwd=clone / below, check=True)
    assert tree(clone) == tree(repository)


def test_the_patch_turns_the_commit_into_the_edited_tree(
    edited: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = (edited / ".git/index").read_bytes()
    check_patch(uncommitted_patch(), edited, tmp_path_factory.mktemp("clone"))
    assert (edited / ".git/index").read_bytes() == index


def test_a_patch_leaves_out_what_cannot_be_in_it(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    append("stages/train.py")(committed)
    unwanted = [committed / name for name in ("src/large", "src/pipe", "src/nested/file")]
    unwanted[0].write_bytes(bytes(1_000_001))
    os.mkfifo(unwanted[1])
    git("init", "--quiet", "src/nested")
    unwanted[2].touch()
    patch = uncommitted_patch()
    for path in unwanted:
        path.unlink()
    check_patch(patch, committed, tmp_path_factory.mktemp("clone"))


SETTINGS = """
[diff]
    noPrefix = true
    mnemonicPrefix = true
    external = false
    context = 0
    interHunkContext = 9
    relative = true
    renames = copies
    orderFile = attributes
    suppressBlankEmpty = true
[diff "upper"]
    textconv = tr a-z A-Z <
[color]
    ui = always
[core]
    quotePath = false
    abbrev = 40
    attributesFile = attributes
[status]
    showUntrackedFiles = no
[log]
    showSignature = true
    decorate = full
"""


def test_no_setting_of_the_user_changes_what_git_says(
    edited: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = commit_tags(), changed_files(), run_title(), uncommitted_patch()
    settings = tmp_path_factory.mktemp("settings")
    (settings / "config").write_text(SETTINGS.replace(" attributes\n", f" {settings}/attributes\n"))
    (settings / "attributes").write_text("* diff=upper\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings / "config"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=0")
    assert (commit_tags(), changed_files(), run_title(), uncommitted_patch()) == expected
    git("stash", "--quiet")  # leaves new files
    assert commit_tags()["git_dirty"] == "true"


# The pipeline below another repository


@pytest.fixture
def around(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a larger repository, in whose directory `pipeline` we work."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(directory.parents[1]))
    commit_all(directory.parent)
    edit_in_every_way(directory)
    return directory.parent


@pytest.mark.parametrize("where", [".", "pipeline"])
def test_a_patch_fits_a_larger_repository_and_the_pipelines_directory(
    around: Path, tmp_path_factory: pytest.TempPathFactory, where: str
) -> None:
    check_patch(uncommitted_patch(), around, tmp_path_factory.mktemp("clone"), where)


def test_a_clone_of_a_larger_repository_has_the_pipeline_in_the_same_place(
    around: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    clone = tmp_path_factory.mktemp("clone")
    assert clone_repository(clone) == clone / "pipeline"
    assert (clone / "pipeline/params.yaml").is_file()


def test_a_pipeline_that_the_repository_around_it_ignores_is_not_clean(committed: Path) -> None:
    (committed / ".gitignore").write_text("*")
    git("rm", "--cached", "--quiet", "-r", ".")
    git("commit", "--quiet", "--allow-empty", "--message", "Ignore all")
    assert commit_tags()["git_dirty"] == "true"
    assert str(committed) in changed_files()[0]


# A git that refuses


@pytest.mark.usefixtures("committed")
def test_if_git_refuses_the_repository_the_tags_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert "safe.directory" in commit_tags()["git_commit"]
    assert commit_tags()["git_dirty"] == "unknown"
    assert (run_title(), uncommitted_patch(), head_commit_or_none()) == ("no commit", "", "none")
    with pytest.raises(GitError, match=r"^fatal: .*safe\.directory"):
        changed_files()
