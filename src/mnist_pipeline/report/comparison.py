"""Compare a run with the specification: its published figures and its checklist."""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from mnist_pipeline.common.params import Params
from mnist_pipeline.model.architecture import Layer
from mnist_pipeline.report import published
from mnist_pipeline.report.results import ResultRow, Results
from mnist_pipeline.report.studies import percent_range


class Comparison(NamedTuple):
    """One of our figures and the published one, both as text."""

    name: str
    ours: str
    published: str


def compare_results(results: Results, monitor_name: str) -> list[Comparison]:
    """Compare the main figures with the published ones."""
    metrics, first, last = results.metrics, results.history[0], results.history[-1]
    best = max(results.history, key=lambda row: row["monitor_accuracy"])
    highest = max(published.TEST_ACCURACY)
    return [
        Comparison("Final test accuracy", f"{metrics['test_accuracy']:.2%}", f"{published.TEST_ACCURACY[-1]:.2%}"),
        Comparison(
            f"Best {monitor_name.lower()} accuracy",
            f"{best['monitor_accuracy']:.2%} (epoch {best['epoch']:.0f})",
            f"{highest:.2%} (epoch {published.TEST_ACCURACY.index(highest) + 1})",
        ),
        Comparison(
            f"{monitor_name} accuracy after epoch 1",
            f"{first['monitor_accuracy']:.2%}",
            f"{published.TEST_ACCURACY[0]:.2%}",
        ),
        Comparison(
            f"{monitor_name} loss, first to last epoch",
            f"{first['monitor_loss']:.4f} → {last['monitor_loss']:.4f}",
            f"{published.TEST_LOSS[0]:.4f} → {published.TEST_LOSS[-1]:.4f}",
        ),
        Comparison(
            "Misclassified test images",
            f"{metrics['test_misclassified']:,} of {metrics['test_total']:,}",
            f"{published.TEST_IMAGES - published.TEST_CORRECT[-1]} of {published.TEST_IMAGES:,}",
        ),
        Comparison("Parameters", f"{metrics['parameters']:,}", f"{published.PARAMETERS:,}"),
        Comparison(
            "Weights, 4 bytes each", f"{metrics['parameters'] * 4 / 1024:.0f} KiB", f"about {published.MODEL_KB} KB"
        ),
    ]


def compare_progress(history: Sequence[ResultRow]) -> list[Comparison]:
    """Compare the monitor's accuracy at each learning rate, and the fall of its loss, with the published ones."""
    comparisons = []
    for rate, group in groupby(history, key=lambda row: row["learning_rate"]):
        rows = list(group)
        first, last = int(rows[0]["epoch"]), int(rows[-1]["epoch"])
        accuracies = published.TEST_ACCURACY[first - 1 : last]
        comparisons.append(
            Comparison(
                f"Accuracy in {f'epochs {first} to' if first < last else 'epoch'} {last}, learning rate {rate:g}",
                percent_range([row["monitor_accuracy"] for row in rows]),
                percent_range(accuracies) if accuracies else "",
            )
        )
    losses = [row["monitor_loss"] for row in history]
    return [*comparisons, Comparison("Loss reduction", _reduction(losses), _reduction(published.TEST_LOSS))]


def _reduction(losses: Sequence[float]) -> str:
    return f"{1 - losses[-1] / losses[0]:.1%}" if losses[0] else ""


def count_of(number: int, noun: str) -> str:
    """Write a number and what it counts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Requirement(NamedTuple):
    """A point of the specification's checklist, whether the run meets it, and the figures that show it."""

    name: str
    met: bool
    evidence: str


def check_requirements(
    params: Params, layers: Sequence[Layer], results: Results, train_images: int, test_images: int, is_mnist: bool
) -> list[Requirement]:
    """Check the run, and the numbers of its images, against the specification's checklist.

    What compares with the published training is left out if the data are not MNIST's.
    """
    kinds = [layer.kind for layer in layers]
    blocks, convolutions = len({layer.block for layer in layers}), kinds.count("Conv2d")
    *earlier, last = ["", *(following for kind, following in pairwise([*kinds, ""]) if kind == "Conv2d")]
    normalized = earlier.count("BatchNorm2d") + (last == "BatchNorm2d")
    parameters, counted = sum(layer.parameters for layer in layers), results.metrics["parameters"]
    techniques = {"global average pooling": "AdaptiveAvgPool2d", "dropout": "Dropout", "batch normalisation": "Batch"}
    used = [name for name, kind in techniques.items() if any(kind in found for found in kinds)]
    epochs, published_epochs = len(results.history), len(published.TEST_ACCURACY)
    accuracy, target = results.metrics["test_accuracy"], published.TEST_ACCURACY[-1]
    error = math.sqrt(target * (1 - target) * (1 / test_images + 1 / published.TEST_IMAGES))
    is_accurate = accuracy >= target - 2 * error
    checks = {
        "Parameter constraint": (
            parameters < params.model.parameter_budget,
            f"{parameters:,} parameters, under {params.model.parameter_budget:,}",
        ),
        "MNIST dataset": (
            is_mnist and train_images == published.TRAIN_IMAGES,
            f"{train_images:,} training and {test_images:,} test images{'' if is_mnist else ' of other data'}",
        ),
        "CNN architecture": (
            (blocks, convolutions) == (3, 7),  # the specification's
            f"{count_of(convolutions, 'convolution')} in {count_of(blocks, 'block')}",
        ),
        "Batch normalisation": (
            normalized == convolutions - 1 and last != "BatchNorm2d",
            f"after {normalized} of {count_of(convolutions, 'convolution')}"
            f"{'; the last one has none' if convolutions and last != 'BatchNorm2d' else ''}",
        ),
        "High performance": (
            is_accurate,
            f"{accuracy:.2%} on the test images; {target:.2%} published; "
            f"two standard errors of their difference are {2 * error:.2%}",
        ),
        "Modern techniques": (len(used) == len(techniques), ", ".join(used) or "none of the specification's"),
        "Fast training": (
            is_accurate and epochs <= published_epochs,
            f"that accuracy in {count_of(epochs, 'epoch')}; {published_epochs} published",
        ),
        "Documentation": (
            parameters == counted,
            f"this report accounts for {parameters:,} of {counted:,} parameters",
        ),
    }
    compared = () if is_mnist else ("High performance", "Fast training")
    return [Requirement(name, *check) for name, check in checks.items() if name not in compared]
