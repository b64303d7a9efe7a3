"""What git says about the working tree: the commit, and what differs from it.

The user's settings of git change no answer: we ask git's plumbing, which ignores most, and override the others.
"""

import os
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import flatten
from mnist_pipeline.common.paths import LOCK, MODEL, PARAMS, REPORTS
from mnist_pipeline.common.yaml_file import read_sections

# The pipeline's outputs are left out: a run changes them itself, so they do not make a tree dirty.
_ALL_BUT_OUTPUTS = ["--", ".", *(f":!{path}" for path in (MODEL.parent, REPORTS, LOCK))]
_GIT = ["git", "--no-optional-locks", "-c", "core.quotePath=true"]
TITLE_LENGTH = 120  # characters; MLflow's tables hold 250
_MAX_NEW_FILE = 1_000_000  # bytes


class GitError(UserError):
    """Git failed, or is not installed. The message is git's own."""


def _ask(command: list[str], stdin: bytes = b"", index: Path | None = None) -> bytes:
    environment = {**os.environ, "GIT_DIFF_OPTS": "", **({"GIT_INDEX_FILE": str(index)} if index else {})}
    try:
        process = subprocess.run(command, input=stdin, capture_output=True, check=False, env=environment)
    except OSError as error:
        raise GitError(f"git cannot be run: {error}") from None
    if process.returncode != 0:
        raise GitError(" ".join(os.fsdecode(process.stderr).split()) or f"`{' '.join(command)}` failed")
    return process.stdout


def ask_git(*arguments: str) -> str:
    """Return what git prints.

    Raises:
        GitError: git fails.
    """
    return os.fsdecode(_ask([*_GIT, *arguments]))


def run_git(*arguments: str) -> str:
    """Return what git prints; nothing if it fails."""
    with suppress(GitError):
        return ask_git(*arguments)
    return ""


def head_commit() -> str:
    """Return the commit of HEAD.

    Raises:
        GitError: there is none, or git refuses the repository.
    """
    # `rev-parse` does not say that there is no commit yet.
    return ask_git("log", "-1", "--no-show-signature", "--format=%H").strip()


def head_commit_or_none() -> str:
    """Return the commit of HEAD, or `none`: machines that train together compare it, but git's reasons may differ."""
    with suppress(GitError):
        return head_commit()
    return "none"


def changed_files() -> list[str]:
    """Return the files and new folders that differ from the commit, without outputs.

    Raises:
        GitError: git fails.
    """
    settings = ["--untracked-files=normal", "--ignore-submodules=none"]
    with _copied_index() as index:
        status = os.fsdecode(_ask([*_GIT, "status", "--porcelain", *settings, *_ALL_BUT_OUTPUTS], index=index))
    changed = [line[3:] for line in status.splitlines()]
    if not changed and not ask_git("ls-tree", "HEAD", "--", str(PARAMS)):
        return [f"{Path.cwd()}, which the git repository around it ignores"]
    return changed


def commit_tags() -> dict[str, str]:
    """Return the tags for the commit, and whether anything but outputs differs from it."""
    try:
        return {"git_commit": head_commit(), "git_dirty": str(bool(changed_files())).lower()}
    except GitError as error:
        return {"git_commit": f"none: {error}", "git_dirty": "unknown"}


def run_title() -> str:
    """Name a run for people: the commit, then the params that differ from it, or `changed` if only other files do."""
    found = commit_tags()
    if found["git_dirty"] == "unknown":
        return "no commit"
    committed = _committed_params()
    params = flatten(read_sections(PARAMS))
    changed = [f"{key}={value}" for key, value in params.items() if committed.get(key, value) != value]
    if found["git_dirty"] == "true" and not changed:
        changed = ["changed"]
    return textwrap.shorten(" ".join([found["git_commit"][:7], *changed]), TITLE_LENGTH, placeholder=" …")


def _committed_params() -> dict[str, object]:
    """Return the commit's flat params; none if its file is absent or damaged."""
    with TemporaryDirectory() as temporary, suppress(UserError):
        file = Path(temporary) / PARAMS
        file.write_bytes(_ask([*_GIT, "cat-file", "blob", f"HEAD:./{PARAMS}"]))
        return flatten(read_sections(file))
    return {}


def uncommitted_patch() -> str:
    """Return a patch for `git apply` of what differs from the commit, without outputs and without large new files."""
    diff = ["diff-index", "--binary", "--full-index", "--no-ext-diff", "--no-textconv", "HEAD", *_ALL_BUT_OUTPUTS]
    with suppress(GitError), _copied_index() as index:  # in a copy, we may declare new files to be known
        no_text = index.with_name("attributes")
        _ask([*_GIT, "update-index", "-q", "--refresh"], index=index)
        listed = _ask([*_GIT, "ls-files", "--others", "--exclude-standard", "-z", *_ALL_BUT_OUTPUTS], index=index)
        new = b"\0".join(path for path in listed.split(b"\0") if _fits_patch(path))
        add = ["--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul"]
        with suppress(GitError):  # the other changes are worth a patch, too
            _ask([*_GIT, *add], new, index)
        try:
            return _ask([*_GIT, *diff], index=index).decode()
        except UnicodeDecodeError:  # a text in another encoding: as binary, it stays whole
            no_text.write_text("* -diff")
            return _ask([*_GIT, "-c", f"core.attributesFile={no_text}", *diff], index=index).decode()
    return ""


@contextmanager
def _copied_index() -> Iterator[Path]:
    """Copy git's index, and date it before all files: git then compares their contents, not only their time and size.

    `dvc exp run -S` writes the index and then `params.yaml`, in the same second and often with the same size.
    """
    with TemporaryDirectory() as temporary:
        index = Path(temporary) / "index"
        with suppress(FileNotFoundError):
            shutil.copyfile(ask_git("rev-parse", "--git-path", "index").removesuffix("\n"), index)
            os.utime(index, (1, 1))
        yield index


def _fits_patch(path: bytes) -> bool:
    """Return whether a new path is a link, or a file that is not too large and can be read."""
    if not os.path.isfile(path):
        return os.path.islink(path)
    return os.access(path, os.R_OK) and os.path.getsize(path) < _MAX_NEW_FILE


def locate_in_repository() -> tuple[str, str]:
    """Return the repository's top directory, and the working directory relative to it.

    Raises:
        GitError: git fails.
    """
    top, below, *_ = ask_git("rev-parse", "--show-toplevel", "--show-prefix").split("\n")
    return top, below


def clone_repository(directory: Path, *options: str) -> Path:
    """Clone the repository around the working directory; return where the working directory lies in the clone.

    Raises:
        GitError: git fails.
    """
    top, below = locate_in_repository()
    ask_git("clone", "--quiet", *options, top, str(directory))
    return directory / below
