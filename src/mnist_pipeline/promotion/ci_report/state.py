"""The state of the repository in a commit or in the workspace: its params, its `dvc.lock` and what the stages wrote."""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_pipeline.common import paths
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import files_below, read_text
from mnist_pipeline.common.params import flatten
from mnist_pipeline.common.yaml_file import load_yaml, read_sections
from mnist_pipeline.report.results import Results, load_results
from mnist_pipeline.tracking.git import run_git


@dataclass(frozen=True)
class State:
    """A directory with the files of a commit or of the workspace, its params by name, the stages of its `dvc.lock`."""

    directory: Path
    params: Mapping[str, object]
    stages: Mapping[str, Any]

    @classmethod
    def load(cls, directory: Path) -> "State":
        """Read `params.yaml` and `dvc.lock`; either may be absent."""
        params, lock = directory / paths.PARAMS, directory / paths.LOCK
        return cls(
            directory,
            flatten(read_sections(params)) if params.is_file() else {},
            load_yaml(read_text(lock), lock).get("stages", {}) if lock.is_file() else {},
        )

    def read_results(self, has_predictions: bool = True) -> Results:
        """Read what the stages wrote; git has all of it but the predictions, so an earlier commit may lack them.

        Raises:
            UserError: a file is absent.
        """
        return load_results(
            self.directory / paths.HISTORY,
            self.directory / paths.METRICS,
            self.directory / paths.PREDICTIONS if has_predictions else None,
            self.directory / paths.CALIBRATION,
            self.directory / paths.ROBUSTNESS,
            self.directory / paths.STUDIES,
        )

    def outdated(self) -> list[str]:
        """Return the names of params, files and folders that changed after the stages read them."""
        recorded = {name: value for stage in self.stages.values() for name, value in stage_inputs(stage).items()}
        files = {name: md5 for name in recorded if (md5 := _dvc_md5(self.directory / name))}
        return [name for name, value in {**self.params, **files}.items() if recorded.get(name, value) != value]


def check_out(revision: str, directory: Path) -> str:
    """Extract a revision's files into a directory and return its commit.

    For git's null revision (all zeros, which CI gives before a branch's first push) return an empty string.

    Raises:
        UserError: the revision does not exist.
    """
    if re.fullmatch("0{40,}", revision):
        return ""
    commit = run_git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    if not commit:
        raise UserError(f"--base must be a commit that this repository has, and is {revision!r}: `git fetch` brings it")
    archive = subprocess.run(["git", "archive", "--format=tar", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, [member for member in tar if member.isfile()], filter="data")
    return commit


def stage_inputs(stage: Mapping[str, Any]) -> dict[str, object]:
    """Return what `dvc.lock` records of a stage's inputs: its command, params by name, and the MD5 of each path."""
    params = {name: value for values in stage.get("params", {}).values() for name, value in flatten(values).items()}
    return {"cmd": stage.get("cmd"), **params, **{path["path"]: path.get("md5") for path in stage.get("deps", [])}}


def changed_names(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return the keys whose values differ between two mappings."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _dvc_md5(path: Path) -> str | None:
    """Return DVC's MD5 of a file or folder; None if it is absent, or if git does not hold all of the folder."""
    if path.is_file():
        return _md5(path.read_bytes())
    # DVC hashes a folder as the JSON list of its files. A *.dvc file stands for files outside git.
    files = files_below(path)
    if not files or any(name.endswith(".dvc") for name in files):
        return None
    listed = [{"md5": _md5(file.read_bytes()), "relpath": name} for name, file in sorted(files.items())]
    return f"{_md5(json.dumps(listed, sort_keys=True).encode())}.dir"


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
