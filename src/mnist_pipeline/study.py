"""Recipes, which are overlays of `params.yaml`; and studies, which train one from many seeds (`mnist study`).

A trial runs the stages train and evaluate as they are, in a temporary copy of the pipeline. Its checkpoint and its
MLflow run lie where those of the repository do, so a killed study goes on where it was.
"""

import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import yaml
from tqdm import tqdm

from mnist_pipeline.errors import UserError
from mnist_pipeline.files import read_csv, read_text, write_csv, write_text
from mnist_pipeline.params import Params, flatten, load_params, read_sections
from mnist_pipeline.paths import EXPERIMENTS, HISTORY, METRICS, PARAMS, PIPELINE, RAW, STUDIES
from mnist_pipeline.provenance import trace
from mnist_pipeline.tracking import PARENT, study_run

VALIDATION_SIZE = 5000  # training images held out, on which choices are made
SPECIFICATION = "specification"
MEASURES = ["test_accuracy", "test_undisputed_accuracy", "test_loss", "test_calibration_error", "parameters"]


def recipe(name: str) -> Path | None:
    """Return the overlay of a recipe, none for `specification`, which is `params.yaml` as it is.

    Raises:
        UserError: there is none of that name.
    """
    if name == SPECIFICATION:
        return None
    path = EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in EXPERIMENTS.glob("*.yaml")))
        raise UserError(f"{path} is absent: the recipes are {known} and {SPECIFICATION}")
    return path


def run_experiment(name: str, arguments: Sequence[str]) -> int:
    """Run a recipe as an experiment of DVC, with further arguments of `dvc exp run`; return its exit code."""
    overlay = recipe(name)
    load_params(overlay=overlay)
    params = flatten(read_sections(overlay)) if overlay else {}
    changes = [f"--set-param={key}={value}" for key, value in params.items()]
    return subprocess.run(["dvc", "exp", "run", "--name", name, *changes, *arguments], check=False).returncode


def study(name: str, seeds: int, validation: bool) -> None:
    """Train a recipe from the seeds 0, 1, 2, … and write each one's row to the study's table as soon as it is there.

    With `validation` it trains on some images less and scores on those; the test images are not looked at. A row that
    is there, of the same params, data and code, is not made again. One process a core, each of one thread: they do more
    than one process of several threads.
    """
    table = STUDIES / f"{name}{'-validation' if validation else ''}.csv"
    trials = {trace("train", params).fingerprint: params for params in plan(name, seeds, validation)}
    rows = [row for row in read_rows(table) if row["fingerprint"] in trials]
    left = {key: params for key, params in trials.items() if key not in {row["fingerprint"] for row in rows}}
    stages = ["train"] if validation else ["train", "evaluate"]
    with study_run(f"study {table.stem}") as parent, ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {pool.submit(run_trial, table.stem, params, stages, parent): key for key, params in left.items()}
        try:
            for future in tqdm(as_completed(futures), desc=table.stem, total=len(left), unit="training", disable=None):
                rows.append({**future.result(), "fingerprint": futures[future]})
                rows.sort(key=lambda row: int(row["seed"]))
                write_csv(table, rows)
                print(f"{table}: {summarize(rows)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"{table}: {summarize(rows)}")


def plan(name: str, seeds: int, validation: bool) -> list[Params]:
    """Return the params of a study's trainings."""
    params = load_params(overlay=recipe(name))
    data = params.data.model_copy(update={"validation_size": VALIDATION_SIZE if validation else 0})
    return [params.model_copy(update={"seed": seed, "threads": 1, "data": data}) for seed in range(seeds)]


def run_trial(name: str, params: Params, stages: Sequence[str], parent: str | None) -> dict[str, str]:
    """Run stages with params in a temporary copy of the pipeline; return the row of what they measured.

    Raises:
        UserError: a stage failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        # With its history, where it has one, so that the run can say how it differs from the commit.
        subprocess.run(["git", "clone", "--quiet", "--shared", ".", temporary], capture_output=True, check=False)
        for directory in ("src", "stages"):
            shutil.copytree(directory, copy / directory, dirs_exist_ok=True)
        shutil.copy(PIPELINE, copy)
        (copy / RAW.parent).mkdir(exist_ok=True)
        (copy / RAW).symlink_to(RAW.resolve())
        write_text(copy / PARAMS, yaml.safe_dump(params.model_dump(), sort_keys=False))
        trial = f"{name}-{params.seed}"
        root = os.environ.get("DVC_ROOT", str(Path.cwd()))
        environment = {**os.environ, "PYTHONPATH": "src", "DVC_ROOT": root, "DVC_EXP_NAME": trial}
        for stage in stages:
            process = subprocess.run(
                [sys.executable, f"stages/{stage}.py"],
                cwd=copy,
                env=environment | ({PARENT: parent} if parent else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if process.returncode != 0:
                said = process.stdout.strip().splitlines() or [f"exit code {process.returncode}"]
                raise UserError(f"{trial}: {stage} failed: {said[-1]}")
        last = read_csv(copy / HISTORY)[-1]
        found = {"monitor_accuracy": last["monitor_accuracy"], "monitor_loss": last["monitor_loss"]}
        if (copy / METRICS).is_file():
            metrics = json.loads(read_text(copy / METRICS))
            found = {measure: metrics[measure] for measure in MEASURES}
        return {"seed": str(params.seed), **{measure: str(value) for measure, value in found.items()}}


def read_rows(table: Path) -> list[dict[str, str]]:
    """Read a study's table as it is, nothing where there is none."""
    return list(csv.DictReader(io.StringIO(read_text(table)))) if table.exists() else []


def summarize(rows: Sequence[Mapping[str, str]]) -> str:
    """Say in a phrase how accurate the trainings of a study are."""
    measure = "test_accuracy" if "test_accuracy" in rows[0] else "monitor_accuracy"
    values = [float(row[measure]) for row in rows]
    spread = f", standard deviation {100 * statistics.stdev(values):.3f} points" if len(values) > 1 else ""
    return (
        f"{len(values)} seeds, {measure} {statistics.mean(values):.3%}{spread}, {min(values):.2%} to {max(values):.2%}"
    )
