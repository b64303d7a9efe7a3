"""Carry the figures of the last runs into README and docs, between comments that mark their places (`make readme`)."""

import json
import math
import re
import statistics
import textwrap
from pathlib import Path

from mnist_pipeline.common.files import read_table, read_text, write_text
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import (
    BENCH,
    CALIBRATION,
    DIFF,
    DROPOUT,
    HISTORY,
    METRICS,
    PREDICTIONS,
    README,
    ROBUSTNESS,
    STUDIES,
)
from mnist_pipeline.report.comparison import compare_results
from mnist_pipeline.report.results import load_results
from mnist_pipeline.report.studies import load_studies, recipe_table

SCALING = Path("docs/scaling.md")
NORMALIZATIONS = 6  # in the network


def main() -> None:
    """Renew every marked part of the pages that have some."""
    for page in (README, SCALING):
        write_text(page, renew(read_text(page)))


def renew(page: str) -> str:
    """Return a page with the text between `<!-- name -->` and `<!-- /name -->` made again from the reports."""
    for name, part in {
        "results": results,
        "recipes": recipes,
        "diff": diff,
        "dropout": dropout,
        "bench": bench,
        "processes": processes,
        "sweeps": sweeps,
        "stores": stores,
    }.items():
        page = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda marks, part=part: f"{marks[1]}{part()}\n{marks[2]}",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
    return page


def results() -> str:
    """The main figures of the committed run beside the specification's, and how far they can be told apart."""
    found = load_results(HISTORY, METRICS, PREDICTIONS, CALIBRATION, ROBUSTNESS, STUDIES)
    rows = compare_results(found, load_params().data.monitor_name)
    accuracy, images = found.metrics["test_accuracy"], found.metrics["test_total"]
    error = math.sqrt(accuracy * (1 - accuracy) / images)
    return (
        table(["", "this repository", "specification"], [[row.name, row.ours, row.published] for row in rows])
        + f"\n\nAn accuracy of {accuracy:.2%} on {images:,} images has a standard error of {100 * error:.2f} points: "
        + f"two single runs\nless than {200 * math.sqrt(2) * error:.2f} points apart cannot be told apart."
    )


def recipes() -> str:
    """What the studies of recipes found."""
    header, *rows = recipe_table(load_studies())
    return table(header, rows)


def diff() -> str:
    """What DVC says of a shorter training beside the committed one."""
    return read_text(DIFF).strip()


def dropout() -> str:
    """Both kinds of dropout: each seed's accuracies, and their means."""
    rows = read_table(DROPOUT)
    lines = []
    for kind in sorted({row["dropout_kind"] for row in rows}, reverse=True):
        chosen = [row for row in rows if row["dropout_kind"] == kind]
        cells = [kind, ", ".join(row["seed"] for row in chosen)]
        for part in ("validation", "test"):
            accuracies = [float(row[f"{part}_accuracy"]) for row in chosen]
            losses = [float(row[f"{part}_loss"]) for row in chosen]
            cells.append(", ".join(f"{accuracy:.2%}" for accuracy in accuracies))
            cells.append(f"**{statistics.mean(accuracies):.2%}**, loss **{statistics.mean(losses):.4f}**")
        lines.append(cells)
    best = max(rows, key=lambda row: mean_validation(rows, row["dropout_kind"]))["dropout_kind"]
    return (
        table(["dropout", "seeds", "validation accuracy", "mean", "test accuracy", "mean"], lines)
        + f"\n\nValidation chooses `{best}`; `params.yaml` has `{load_params().model.dropout_kind}`."
    )


def mean_validation(rows: list[dict[str, str]], kind: str) -> float:
    """Return the mean validation accuracy of a kind of dropout."""
    return statistics.mean(float(row["validation_accuracy"]) for row in rows if row["dropout_kind"] == kind)


def bench() -> str:
    """What training, testing and the pipeline around them cost, in ratios where they can be had."""
    measured = json.loads(read_text(BENCH))
    epochs = {name: statistics.median(seconds) for name, seconds in measured["epoch_seconds"].items()}
    of_plain = {name: ratios(measured["epoch_seconds"], name, "plain") for name in epochs}
    rows = [
        [f"An epoch: {name}", f"{seconds:.1f} s", f"{statistics.median(of_plain[name]):.2f}", spread(of_plain[name])]
        for name, seconds in epochs.items()
    ]
    trainings = {name: training["seconds"] for name, training in measured["trainings"].items()}
    rows += [[f"A training: {name}", f"{seconds:.0f} s", "", ""] for name, seconds in trainings.items()]
    rows += [
        [f"Start-up of {name}" if name != "dvc repro" else "`dvc repro`, nothing to do", f"{seconds:.1f} s", "", ""]
        for name, seconds in (
            (name, statistics.median(rounds)) for name, rounds in measured["pipeline_seconds"].items()
        )
    ]
    floor = measured["floor"]["epoch_operations"] / measured["floor"]["operations_a_second"]
    tracking = statistics.median(measured["tracking_seconds"]) / trainings["specification"]
    reached = {name: reaching(training["epochs"]) for name, training in measured["trainings"].items()}
    growth = [
        f"by {what}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items())
        for what, found in measured["growth"].items()
    ]
    sentences = [
        f"*fast* takes **{trainings['fast'] / trainings['specification']:.2f}** of the specification's time.",
        *(f"Of seed 0, {name} {when}." for name, when in reached.items()),
        f"An epoch is {measured['floor']['epoch_operations'] / 1e12:.2f}·10¹² operations, which this processor does in "
        f"{floor:.1f} s where it multiplies large matrices: the floor is {floor / epochs['pipeline']:.2f} of an epoch.",
        f"{measured['test_images_a_second']:,.0f} test images pass in a second.",
        f"Tracking and checkpoints add **{tracking:.1%}** to a training, a new database included.",
        f"The train stage peaks at **{measured['train_peak_memory_mb'] / 1000:.2f} GB** of memory.",
        f"An epoch of 10,000 images costs, {'; '.join(growth)}.",
    ]
    text = textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)
    return table(["", "median", "of the plain loop", "rounds in turn"], rows) + "\n\n" + text


def processes() -> str:
    """How fast several processes train, and from where on more of them do not pay."""
    measured = json.loads(read_text(BENCH))["scaling"]
    rates = measured["images_a_second"]
    one, *_ = rates
    of_one = {layout: [rate / alone for rate, alone in zip(rates[layout], rates[one], strict=True)] for layout in rates}
    rows = [
        [layout, f"{statistics.median(rates[layout]):,.0f}", f"{statistics.median(found):.2f}", spread(found)]
        for layout, found in of_one.items()
    ]
    params = load_params()
    image = 1 / statistics.median(rates[one])
    gradient, statistic = (measured["seconds_of_a_sum"][kind] for kind in ("gradient", "statistics"))
    exchange = gradient + 2 * NORMALIZATIONS * statistic
    step = params.train.batch_size * image
    dearer = measured["seconds_of_a_step"]["in a group"] / measured["seconds_of_a_step"]["alone"]
    sums, wait, work = 2 * NORMALIZATIONS, 1000 * exchange, 1000 * step
    text = (
        f"A sum over two processes takes {1000 * gradient:.2f} ms for all gradients and {1000 * statistic:.2f} ms for "
        f"the statistics of a normalisation. A step needs one of the first and {sums} of the second, forward and "
        f"backward: {wait:.1f} ms, beside {work:.0f} ms of arithmetic for a batch of {params.train.batch_size} on one "
        f"core. The group's own normalisation and dropout, of several operations each where torch's are one, make the "
        f"arithmetic {dearer:.2f} times as long. So with a whole core for each, a step on N of them takes about "
        f"{dearer * work:.0f}/N + {wait:.1f} ms: two are {step / (dearer * step / 2 + exchange):.1f} times as fast as "
        f"one alone, with {max(1, round(dearer * step / exchange))} half of a step is waiting, and no number of them "
        f"is more than {step / exchange:.0f} times as fast."
    )
    header = ["", "images a second", "of one process of one thread", "rounds in turn"]
    return table(header, rows) + "\n\n" + textwrap.fill(text, 120, break_on_hyphens=False)


def sweeps() -> str:
    """What a sweep of a thousand trials takes, by the trainings of the studies."""
    trials, cores = 1000, 2
    rows = []
    for study in load_studies():
        seconds = study.mean("seconds")
        hours = [trials * seconds / (cores * machines) / 3600 for machines in (1, 10, 100)]
        epochs = cores * 100 * study.mean("epochs") / seconds
        rows.append([study.name, f"{seconds / 60:.1f}", *(f"{each:,.1f}" for each in hours), f"{epochs:.0f}"])
    header = ["trials like", "minutes a trial", "hours on 1 machine", "on 10", "on 100", "epochs a second on 100"]
    return table(header, rows)


def stores() -> str:
    """What tracking stores bear, in calls one after the other."""
    measured = json.loads(read_text(BENCH))["stores"]
    kinds = list(next(iter(measured.values())))
    rows = [[store, *(f"{found[kind]:,.0f}" for kind in kinds)] for store, found in measured.items()]
    return table(["a second", *kinds], rows)


def ratios(seconds: dict[str, list[float]], name: str, other: str) -> list[float]:
    """Return, round by round, what share one takes of another's time."""
    return [ours / theirs for ours, theirs in zip(seconds[name], seconds[other], strict=True)]


def spread(values: list[float]) -> str:
    """Say between what values some lie."""
    return f"{min(values):.2f} to {max(values):.2f}"


def reaching(epochs: list[dict[str, float]]) -> str:
    """Say when a training was as accurate as what the specification published."""
    published = specification.TEST_CORRECT[-1] / specification.TEST_IMAGES
    for number, epoch in enumerate(epochs, 1):
        if epoch["accuracy"] >= published:
            return f"reached {published:.2%} after epoch {number} and {epoch['seconds']:.0f} s"
    return f"did not reach {published:.2%} and ended at {epochs[-1]['accuracy']:.2%}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
