"""A run beside the specification: the published figures, and the points of its checklist."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from mnist_pipeline.common.params import Params
from mnist_pipeline.report import published
from mnist_pipeline.report.architecture import Layer
from mnist_pipeline.report.results import ResultRow, Results


@dataclass(frozen=True)
class Comparison:
    """A figure of ours beside the published one, both as text."""

    name: str
    ours: str
    published: str


def compare_results(results: Results, monitor_name: str) -> list[Comparison]:
    """Set the main figures beside the specification's."""
    first, last = results.history[0], results.history[-1]
    best = max(results.history, key=lambda row: row["monitor_accuracy"])
    accuracies = [correct / published.TEST_IMAGES for correct in published.TEST_CORRECT]
    best_epoch = max(range(len(accuracies)), key=accuracies.__getitem__)
    monitor = monitor_name.lower()
    return [
        Comparison("Final test accuracy", f"{results.metrics['test_accuracy']:.2%}", f"{accuracies[-1]:.2%}"),
        Comparison(
            f"Best {monitor} accuracy",
            f"{best['monitor_accuracy']:.2%} (epoch {best['epoch']:.0f})",
            f"{accuracies[best_epoch]:.2%} (epoch {best_epoch + 1})",
        ),
        Comparison(
            f"{monitor_name} accuracy after epoch 1", f"{first['monitor_accuracy']:.2%}", f"{accuracies[0]:.2%}"
        ),
        Comparison(
            f"{monitor_name} loss, first to last epoch",
            f"{first['monitor_loss']:.4f} → {last['monitor_loss']:.4f}",
            f"{published.TEST_LOSS[0]:.4f} → {published.TEST_LOSS[-1]:.4f}",
        ),
        Comparison(
            "Misclassified test images",
            f"{results.metrics['test_misclassified']:,} of {results.metrics['test_total']:,}",
            f"{published.TEST_IMAGES - published.TEST_CORRECT[-1]} of {published.TEST_IMAGES:,}",
        ),
        Comparison("Parameters", f"{results.metrics['parameters']:,}", f"{published.PARAMETERS:,}"),
        Comparison(
            "Weights, 4 bytes each",
            f"{results.metrics['parameters'] * 4 / 1024:.0f} KiB",
            f"about {published.MODEL_KB} KB",
        ),
    ]


def compare_progress(history: Sequence[ResultRow]) -> list[Comparison]:
    """Set how the monitor moved, over each stretch of one learning rate and overall, beside the published."""
    accuracies = [correct / published.TEST_IMAGES for correct in published.TEST_CORRECT]
    comparisons = []
    for rate, group in groupby(history, key=lambda row: row["learning_rate"]):
        rows = list(group)
        first, last = int(rows[0]["epoch"]), int(rows[-1]["epoch"])
        comparisons.append(
            Comparison(
                f"Accuracy in epochs {first} to {last}, learning rate {rate:g}",
                _percentages([row["monitor_accuracy"] for row in rows]),
                _percentages(accuracies[first - 1 : last]),
            )
        )
    losses = [row["monitor_loss"] for row in history]
    return [*comparisons, Comparison("Loss reduction", _reduction(losses), _reduction(published.TEST_LOSS))]


def _percentages(accuracies: Sequence[float]) -> str:
    """Say between which two accuracies a stretch of epochs moved."""
    return f"{min(accuracies):.2%} to {max(accuracies):.2%}" if accuracies else ""


def _reduction(losses: Sequence[float]) -> str:
    """Say by how much a loss fell from the first epoch to the last."""
    return f"{1 - losses[-1] / losses[0]:.1%}"


@dataclass(frozen=True)
class Requirement:
    """A point of the specification's checklist, whether the run meets it, and by what figures."""

    name: str
    met: bool
    evidence: str


def check_requirements(
    params: Params, layers: Sequence[Layer], results: Results, train: int, test: int
) -> list[Requirement]:
    """Evaluate the specification's checklist on the run."""
    kinds = [layer.kind for layer in layers]
    followers = [after for before, after in pairwise(kinds) if before == "Conv2d"]
    parameters = sum(layer.parameters for layer in layers)
    accuracy = results.metrics["test_accuracy"]
    target = published.TEST_CORRECT[-1] / published.TEST_IMAGES
    error = math.sqrt(target * (1 - target) * (1 / test + 1 / published.TEST_IMAGES))
    return [
        Requirement(
            "Parameter constraint",
            parameters < params.model.parameter_budget,
            f"{parameters:,} parameters, under {params.model.parameter_budget:,}",
        ),
        Requirement(
            "MNIST dataset",
            (train, test) == (published.TRAIN_IMAGES, published.TEST_IMAGES),
            f"{train:,} training and {test:,} test images",
        ),
        Requirement(
            "CNN architecture",
            len({layer.block for layer in layers}) == 3 and kinds.count("Conv2d") == 7,  # the specification's
            f"{kinds.count('Conv2d')} convolutions in {len({layer.block for layer in layers})} blocks",
        ),
        Requirement(
            "Batch normalisation",
            all(kind == "BatchNorm2d" for kind in followers[:-1]) and followers[-1] != "BatchNorm2d",
            f"after {followers.count('BatchNorm2d')} of {len(followers)} convolutions, the last one left bare",
        ),
        Requirement(
            "High performance",
            accuracy >= target - 2 * error,
            f"{accuracy:.2%} on the test images; {target:.2%} published; "
            f"two standard errors of their difference are {2 * error:.2%}",
        ),
        Requirement(
            "Modern techniques",
            {"AdaptiveAvgPool2d", "BatchNorm2d"} <= set(kinds) and any("Dropout" in kind for kind in kinds),
            "global average pooling, dropout, batch normalisation",
        ),
        Requirement(
            "Fast training",
            accuracy >= target - 2 * error and len(results.history) <= len(published.TEST_CORRECT),
            f"that accuracy in {len(results.history)} epochs; {len(published.TEST_CORRECT)} published",
        ),
        Requirement(
            "Documentation",
            parameters == results.metrics["parameters"],
            f"this report accounts for {parameters:,} of {results.metrics['parameters']:,} parameters",
        ),
    ]
