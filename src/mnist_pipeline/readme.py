"""Carry the figures of the last runs into the README, between the comments that mark their places (`make readme`)."""

import json
import math
import re
import statistics
import textwrap

from mnist_pipeline.files import read_table, read_text, write_text
from mnist_pipeline.params import load_params
from mnist_pipeline.paths import (
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
from mnist_pipeline.recipes import load_studies, tabulate
from mnist_pipeline.reporting import compare, load_results


def main() -> None:
    """Renew every marked part of the README."""
    write_text(README, renew(read_text(README)))


def renew(readme: str) -> str:
    """Return the README with the text between `<!-- name -->` and `<!-- /name -->` made again from the reports."""
    for name, part in {
        "results": results,
        "recipes": recipes,
        "diff": diff,
        "dropout": dropout,
        "bench": bench,
    }.items():
        readme = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda marks, part=part: f"{marks[1]}{part()}\n{marks[2]}",  # type: ignore[misc]
            readme,
            flags=re.DOTALL,
        )
    return readme


def results() -> str:
    """The main figures of the committed run beside the specification's, and how far they can be told apart."""
    found = load_results(HISTORY, METRICS, PREDICTIONS, CALIBRATION, ROBUSTNESS, STUDIES)
    rows = compare(found, load_params().data.monitor_name)
    accuracy, images = found.metrics["test_accuracy"], found.metrics["test_total"]
    error = math.sqrt(accuracy * (1 - accuracy) / images)
    return (
        table(["", "this repository", "specification"], [[row.name, row.ours, row.published] for row in rows])
        + f"\n\nAn accuracy of {accuracy:.2%} on {images:,} images has a standard error of {100 * error:.2f} points: "
        + f"two single runs\nless than {200 * math.sqrt(2) * error:.2f} points apart cannot be told apart."
    )


def recipes() -> str:
    """What the studies of recipes found."""
    header, *rows = tabulate(load_studies())
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
    """How an epoch compares with the plain loop, what tracking adds, and the memory of a training."""
    measured = json.loads(read_text(BENCH))
    ratio = measured["ratio"]
    rounds = len(measured["epoch_seconds"]["plain"])
    sentences = [
        f"An epoch takes **{ratio['median']:.2f}** of the time of the plain loop (a `DataLoader` with torchvision's "
        f"transforms; {ratio['min']:.2f} to {ratio['max']:.2f} over {rounds} rounds in turn).",
        f"Tracking and checkpoints add **{measured['tracking_share']:.1%}** to a training, a new database included.",
        f"The train stage peaks at **{measured['train_peak_memory_mb'] / 1000:.2f} GB** of memory.",
    ]
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
