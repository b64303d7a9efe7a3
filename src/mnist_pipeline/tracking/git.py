"""What git says about the working tree: the commit, and what differs from it."""

import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any, cast

import yaml

from mnist_pipeline.common.params import flatten, load_yaml, read_sections
from mnist_pipeline.common.paths import LOCK, MODEL, PARAMS, REPORTS

# With these arguments git ignores the pipeline's outputs: a run changes them itself, so they do not make a tree dirty.
ALL_BUT_OUTPUTS = ["--", ".", *(f":!{path}" for path in (MODEL.parent, REPORTS, LOCK))]
TITLE_LENGTH = 120  # characters; MLflow's tables hold 250
_NO_COMMIT = "none: not a commit of a git repository"
_MAX_NEW_FILE = 1_000_000  # bytes


def run_git(*arguments: str) -> str:
    """Return what git prints; nothing if it fails or is not installed."""
    try:
        process = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return process.stdout.decode(errors="replace")


def commit_tags() -> dict[str, str]:
    """Return the tags for the commit, and whether anything but outputs differs from it."""
    if not (head := run_git("rev-parse", "--verify", "--quiet", "HEAD").strip()):
        return {"git_commit": _NO_COMMIT, "git_dirty": "unknown"}
    return {"git_commit": head, "git_dirty": str(bool(run_git("status", "--porcelain", *ALL_BUT_OUTPUTS))).lower()}


def run_title() -> str:
    """Name a run for people: the commit, then the params that differ from it, or `changed` if only other files do."""
    found = commit_tags()
    if found["git_commit"] == _NO_COMMIT:
        return "no commit"
    committed = _committed_params()
    params = flatten(read_sections(PARAMS))
    changed = [f"{key}={value}" for key, value in params.items() if committed.get(key, value) != value]
    if found["git_dirty"] == "true" and not changed:
        changed = ["changed"]
    return textwrap.shorten(" ".join([found["git_commit"][:7], *changed]), TITLE_LENGTH, placeholder=" …")


def _committed_params() -> dict[str, object]:
    """Return the commit's flat params; none if its file is absent or damaged."""
    try:
        return flatten(cast("dict[str, Any]", load_yaml(run_git("show", f"HEAD:./{PARAMS}"))))
    except (yaml.YAMLError, AttributeError):
        return {}


def uncommitted_patch() -> str:
    """Return a patch of what differs from the commit, without outputs and without large new files."""
    if commit_tags()["git_commit"] == _NO_COMMIT:
        return ""
    diff = ["diff", "--no-color", "--no-ext-diff"]
    listed = run_git("ls-files", "--others", "--exclude-standard", "-z", *ALL_BUT_OUTPUTS).split("\0")
    new = [path for path in listed if path and Path(path).stat().st_size < _MAX_NEW_FILE]
    patches = [run_git(*diff, "--no-index", "--", os.devnull, path) for path in new]
    return run_git(*diff, "HEAD", *ALL_BUT_OUTPUTS) + "".join(patches)
