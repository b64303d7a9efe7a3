"""Recipes: files in experiments/ that override some of `params.yaml`, and how `mnist experiment` runs one."""

import json
import re
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import flatten, load_params
from mnist_pipeline.common.paths import EXPERIMENTS
from mnist_pipeline.common.yaml_file import read_sections
from mnist_pipeline.report.studies import SPECIFICATION
from mnist_pipeline.tracking.git import run_git


def find_recipe(name: str) -> Path | None:
    """Return the file of a recipe, None for the specification.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name == SPECIFICATION:
        return None
    known = [SPECIFICATION, *sorted(file.stem for file in EXPERIMENTS.glob("*.yaml"))]
    path = EXPERIMENTS / f"{name}.yaml"
    if name not in known:
        recipes = textwrap.shorten(", ".join(known), 150, placeholder=" …")
        raise UserError(f"{repr(str(path))[1:-1]:.80} is absent: the recipes are {recipes}")
    return path


def run_experiment(name: str, arguments: Sequence[str]) -> int:
    """Run a recipe by `dvc exp run`, which also gets the arguments; return its exit code.

    Raises:
        UserError: there is no such recipe, it does not fit `params.yaml`, or DVC would lose the experiment.
    """
    overlay = find_recipe(name)
    load_params(overlay=overlay)
    if {"--temp", "--queue"} & set(arguments):
        _check_copies()
    values = flatten(read_sections(overlay)) if overlay else {}
    settings = [f"--set-param={key}={json.dumps(value, default=str)}" for key, value in values.items()]
    return subprocess.run(["dvc", "exp", "run", "--name", name, *settings, *arguments], check=False).returncode


def _check_copies() -> None:
    """Check that DVC can run an experiment in a copy of the repository."""
    if run_git("rev-parse", "--is-shallow-repository").strip() == "true":
        raise UserError(
            "DVC loses an experiment with --temp or --queue in a shallow clone: first `git fetch --unshallow`"
        )
    if odd := re.search("[^ -~]|[#?]|%[0-9A-Fa-f]{2}", str(Path.cwd())):
        raise UserError(
            f"DVC loses an experiment with --temp or --queue below a directory with {odd[0]} in its name: "
            "leave out the option, or rename the directory"
        )
