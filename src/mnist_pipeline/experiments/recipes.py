"""Recipes: overlays of `params.yaml` in experiments/, and how DVC runs one (`mnist experiment`)."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import flatten, load_params, read_sections
from mnist_pipeline.common.paths import EXPERIMENTS
from mnist_pipeline.report.studies import SPECIFICATION


def overlay_of(name: str) -> Path | None:
    """Return the overlay of a recipe, none for the specification.

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
    """Run a recipe as an experiment of DVC, with further arguments of `dvc exp run`; return its exit code."""
    overlay = overlay_of(name)
    load_params(overlay=overlay)
    sections = flatten(read_sections(overlay)) if overlay else {}
    changes = [f"--set-param={key}={json.dumps(value)}" for key, value in sections.items()]
    return subprocess.run(["dvc", "exp", "run", "--name", name, *changes, *arguments], check=False).returncode
