"""Copy the figures of the last runs into README.md and docs/*.md: `python -m benchmarks.pages`.

A page marks each part that is renewed with two comments: `<!-- name -->` and `<!-- /name -->`.
"""

import json
import math
import re
import statistics
import textwrap
from pathlib import Path
from typing import Any

from mnist_pipeline.common.errors import run
from mnist_pipeline.common.files import read_table, read_text, write_text
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import (
    BENCH,
    CALIBRATION,
    DIFF,
    HISTORY,
    METRICS,
    PROCESSORS,
    ROBUSTNESS,
    STUDIES,
)
from mnist_pipeline.report import published
from mnist_pipeline.report.comparison import compare_results
from mnist_pipeline.report.results import load_results
from mnist_pipeline.report.studies import load_studies, recipe_table
from mnist_pipeline.report.tables import markdown_table

_NORMALIZATIONS = 6  # in the network
_CORES = 2  # of each machine of a sweep


def main() -> None:
    """Renew the marked parts of all pages."""
    for page in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        text = read_text(page)
        if (renewed := renew(text)) != text:
            write_text(page, renewed)
            print(f"{page} is renewed")


def renew(page: str) -> str:
    """Return a page's text with every marked part written anew from reports/.

    Raises:
        UserError: a file of reports/ that a part needs is absent.
    """
    for name, part in {
        "results": _results,
        "recipes": _recipes,
        "diff": _diff,
        "bench": _bench,
        "processes": _processes,
        "sweeps": _sweeps,
        "stores": _stores,
        "processors": _processors,
    }.items():
        page = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda marks, part=part: f"{marks[1]}{part()}\n{marks[2]}",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
    return page


def _results() -> str:
    """Compare the main figures in reports/ with the specification's, and say how precise they are."""
    found = load_results(HISTORY, METRICS, None, CALIBRATION, ROBUSTNESS, STUDIES)
    rows = compare_results(found, load_params().data.monitor_name)
    accuracy, images = found.metrics["test_accuracy"], found.metrics["test_total"]
    error = math.sqrt(accuracy * (1 - accuracy) / images)
    text = (
        f"An accuracy of {accuracy:.2%} on {images:,} images has a standard error of {100 * error:.2f} points. "
        f"If two single runs differ by less than {200 * math.sqrt(2) * error:.2f} points, it may be chance."
    )
    table = markdown_table(
        ["", "this repository", "specification"], [[row.name, row.ours, row.published] for row in rows]
    )
    return f"{table}\n\n{_wrap(text)}"


def _recipes() -> str:
    rows = recipe_table(load_studies())
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def _diff() -> str:
    return read_text(DIFF).strip()


def _bench() -> str:
    """Say what training, testing and the pipeline around them cost, as ratios where possible."""
    measured = _measured()
    seconds_of = measured["epoch_seconds"]
    epochs = {name: statistics.median(seconds) for name, seconds in seconds_of.items()}
    trainings = {name: training["seconds"] for name, training in measured["trainings"].items()}
    rows = []
    names = {
        "pipeline": "An epoch: pipeline",
        "free kernels": "An epoch: kernels not pinned",
        "plain": "An epoch: plain",
        "evaluate": "The evaluation",
    }
    for name, seconds in epochs.items():
        ratios = [ours / plain for ours, plain in zip(seconds_of[name], seconds_of["plain"], strict=True)]
        rows.append([names[name], f"{seconds:.1f} s", f"{statistics.median(ratios):.2f}", _spread(ratios)])
    rows += [[f"A training: {name}", f"{seconds:.0f} s", "", ""] for name, seconds in trainings.items()]
    for name, rounds in measured["pipeline_seconds"].items():
        label = "`dvc repro` with nothing to do" if name == "dvc repro" else f"Start-up of {name}"
        rows.append([label, f"{statistics.median(rounds):.1f} s", "", ""])
    operations = measured["floor"]["epoch_operations"]
    floor = operations / measured["floor"]["operations_a_second"]
    tracking = statistics.median(measured["tracking_seconds"]) / trainings["specification"]
    growth = {
        what: ", ".join(f"{value}: {seconds:.1f} s" for value, seconds in found.items())
        for what, found in measured["growth"].items()
    }
    sentences = [
        f"*fast* takes **{trainings['fast'] / trainings['specification']:.2f}** of the specification's time.",
        *(f"With seed 0, {name} {_reach(training['epochs'])}." for name, training in measured["trainings"].items()),
        f"An epoch is {operations / 1e12:.2f}·10¹² operations. If this processor did them as fast as it multiplies "
        f"large matrices, they would take {floor:.1f} s: {floor / epochs['pipeline']:.2f} of an epoch.",
        f"The network reads {measured['test_images_a_second']:,.0f} test images a second.",
        f"Tracking and checkpoints add **{tracking:.1%}** to a training, including a new database.",
        f"The train stage needs **{measured['train_peak_memory_mb'] / 1000:.2f} GB** of memory at its peak.",
        f"An epoch, by number of images: {growth['images']}.",
        f"An epoch on 10,000 images, by batch size: {growth['batch']}.",
        f"An epoch on 10,000 images, by width of the layers: {growth['widths']}.",
    ]
    table = markdown_table(["", "median", "relative to the plain loop", "lowest to highest round"], rows)
    return "\n".join([table, "", *(_wrap(f"- {sentence}", "  ") for sentence in sentences)])


def _processes() -> str:
    """Say how fast several processes train, and how many are worth it."""
    measured = _measured()["scaling"]
    rates = measured["images_a_second"]
    one, *_ = rates
    rows = []
    for layout in rates:
        ratios = [rate / alone for rate, alone in zip(rates[layout], rates[one], strict=True)]
        median = f"{statistics.median(rates[layout]):,.0f}"
        rows.append([layout, median, f"{statistics.median(ratios):.2f}", _spread(ratios)])
    batch = load_params().train.batch_size
    step = batch / statistics.median(rates[one])
    sums = 2 * _NORMALIZATIONS
    gradient, statistic = (measured["seconds_of_a_sum"][kind] for kind in ("gradient", "statistics"))
    exchange = gradient + sums * statistic
    text = (
        f"With two processes, the sum of all gradients takes {1000 * gradient:.2f} ms and the sum of the statistics of "
        f"one normalisation {1000 * statistic:.2f} ms. A step needs one of the first and {sums} of the second, forward "
        f"and backward: {1000 * exchange:.1f} ms, beside {1000 * step:.0f} ms of arithmetic for a batch of {batch} on "
        f"one core. So if each of N processes has a whole core, a step takes about {1000 * step:.0f}/N + "
        f"{1000 * exchange:.1f} ms: two processes are {step / (step / 2 + exchange):.1f} times as fast as one; with "
        f"{max(1, round(step / exchange))}, half of each step is waiting; no number of processes is more than "
        f"{step / exchange:.0f} times as fast as one."
    )
    header = ["", "images a second", "relative to one process of one thread", "lowest to highest round"]
    return f"{markdown_table(header, rows)}\n\n{_wrap(text)}"


def _processors() -> str:
    """List the processors on which `mnist reproduce` found all outputs identical."""
    header = ["processor", "its instruction sets beyond AVX2, which are not used", "cores"]
    found = read_table(PROCESSORS) if PROCESSORS.exists() else []
    rows = [[row["processor"], row["beyond_avx2"], row["cores"]] for row in found]
    return markdown_table(header, rows)


def _sweeps() -> str:
    """Estimate from the studies' trainings how long a sweep of a thousand trials takes."""
    trials = 1000
    rows = []
    for study in load_studies():
        seconds = study.mean("seconds")
        hours = [trials * seconds / (_CORES * machines) / 3600 for machines in (1, 10, 100)]
        epochs = _CORES * 100 * study.mean("epochs") / seconds
        rows.append([study.name, f"{seconds / 60:.1f}", *(f"{each:,.1f}" for each in hours), f"{epochs:.0f}"])
    header = ["trials like", "minutes a trial", "hours on 1 machine", "on 10", "on 100", "epochs a second on 100"]
    return markdown_table(header, rows)


def _stores() -> str:
    """Say how many calls a second tracking stores answer, one after the other."""
    measured = _measured()["stores"]
    kinds = list(next(iter(measured.values())))
    rows = [[store, *(f"{found[kind]:,.0f}" for kind in kinds)] for store, found in measured.items()]
    return markdown_table(["a second", *kinds], rows)


def _measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_text(BENCH))
    return found


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False)


def _spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _reach(epochs: list[dict[str, float]]) -> str:
    """Say after which epoch a training reached the accuracy that the specification published."""
    target = published.TEST_CORRECT[-1] / published.TEST_IMAGES
    for number, epoch in enumerate(epochs, 1):
        if epoch["accuracy"] >= target:
            return f"reached {target:.2%} after epoch {number} ({epoch['seconds']:.0f} s)"
    return f"did not reach {target:.2%} and ended at {epochs[-1]['accuracy']:.2%}"


if __name__ == "__main__":
    run(main)
