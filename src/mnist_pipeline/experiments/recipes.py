"""Recipes: files in experiments/ that override some of `params.yaml`, and how `mnist experiment` runs one."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import flatten, load_params, read_sections
from mnist_pipeline.common.paths import EXPERIMENTS
from mnist_pipeline.report.studies import SPECIFICATION


def find_recipe(name: str) -> Path | None:
    """Return the file of a recipe, None for the specification.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name == SPECIFICATION:
        return None
    path = EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join([SPECIFICATION, *sorted(file.stem for file in EXPERIMENTS.glob("*.yaml"))])
        raise UserError(f"{path} is absent: the recipes are {known}")
    return path


def run_experiment(name: str, arguments: Sequence[str]) -> int:
    """Run a recipe by `dvc exp run`, which also gets the arguments; return its exit code.

    Raises:
        UserError: there is no such recipe, or it does not fit `params.yaml`.
    """
    overlay = find_recipe(name)
    load_params(overlay=overlay)
    values = flatten(read_sections(overlay)) if overlay else {}
    settings = [f"--set-param={key}={json.dumps(value)}" for key, value in values.items()]
    return subprocess.run(["dvc", "exp", "run", "--name", name, *settings, *arguments], check=False).returncode
