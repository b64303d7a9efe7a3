"""Recipes as experiments of DVC (`mnist experiment`), and trained from many seeds (`mnist study`)."""

import json
import subprocess
from collections.abc import Sequence

from tqdm import tqdm

from mnist_pipeline.files import write_csv
from mnist_pipeline.params import Params, flatten, load_params, read_sections
from mnist_pipeline.paths import STUDIES
from mnist_pipeline.provenance import trace
from mnist_pipeline.recipes import MEASURES, VALIDATION, Study, overlay_of, read_rows
from mnist_pipeline.tracking import study_run
from mnist_pipeline.tracking.trials import close_lost_runs
from mnist_pipeline.trial import VALIDATION_SIZE, Trial, alone
from mnist_pipeline.workers import place_of, workers


def run_experiment(name: str, arguments: Sequence[str]) -> int:
    """Run a recipe as an experiment of DVC, with further arguments of `dvc exp run`; return its exit code."""
    overlay = overlay_of(name)
    load_params(overlay=overlay)
    sections = flatten(read_sections(overlay)) if overlay else {}
    changes = [f"--set-param={key}={json.dumps(value)}" for key, value in sections.items()]
    return subprocess.run(["dvc", "exp", "run", "--name", name, *changes, *arguments], check=False).returncode


def study(name: str, seeds: int, validation: bool, ray: str | None = None) -> None:
    """Train a recipe from the seeds 0, 1, 2, … and write each one's row to the study's table as soon as it is there.

    With `validation` it trains on some images less and scores on those; the test images are not looked at. A row that
    is there, of the same params, data and code, is not made again. One process a core, each of one thread: they do more
    than one process of several threads. With `ray` they run in the cluster at that address.
    """
    table = STUDIES / f"{name}{VALIDATION if validation else ''}.csv"
    measure = "monitor_accuracy" if validation else "test_accuracy"
    trials = {trace("train", params).fingerprint: params for params in plan(name, seeds, validation)}
    wanted = {"fingerprint", "monitor_accuracy", *([] if validation else MEASURES)}
    rows = [row for row in read_rows(table) if wanted <= row.keys() and row["fingerprint"] in trials]
    left = trials.keys() - {row["fingerprint"] for row in rows}
    stages = ["train"] if validation else ["train", "evaluate"]
    with place_of(ray) as place, study_run(f"study {table.stem}") as parent:
        with workers(place) as pool:

            def train(fingerprint: str) -> dict[str, str] | None:
                params = trials[fingerprint]
                return pool.run(Trial(f"{table.stem}-{params.seed}", params, stages, parent))

            found = pool.map(train, [fingerprint for fingerprint in trials if fingerprint in left])
            for fingerprint, row in tqdm(found, desc=table.stem, total=len(left), unit="training", disable=None):
                rows.append({**(row or {}), "fingerprint": fingerprint})
                rows.sort(key=lambda row: int(row["seed"]))
                write_csv(table, rows)
                print(f"{table}: {Study(name, rows).summary(measure)}", flush=True)
        close_lost_runs(parent)
    if not left:
        print(f"{table}: {Study(name, rows).summary(measure)}, all there")


def plan(name: str, seeds: int, validation: bool) -> list[Params]:
    """Return the params of a study's trainings; the recipe `specification` is `params.yaml` as it is."""
    params = load_params(overlay=overlay_of(name))
    data = params.data.model_copy(update={"validation_size": VALIDATION_SIZE if validation else 0})
    return [alone(params.model_copy(update={"seed": seed, "data": data})) for seed in range(seeds)]
