"""The report: every table of the specification, computed from the run and set beside the published figures."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from torch import nn
from tqdm import tqdm

from mnist_pipeline import specification
from mnist_pipeline.architecture import Layer
from mnist_pipeline.corruptions import CORRUPTIONS
from mnist_pipeline.data import CLASSES, SIDE, Digits
from mnist_pipeline.evaluation import BINS, SCORES, family_means
from mnist_pipeline.figures import (
    Chart,
    draw_confusion_matrix,
    draw_filters,
    draw_learning_curve,
    draw_network,
    draw_reliability,
    draw_robustness,
    draw_studies,
    write_chart,
    write_digit,
)
from mnist_pipeline.files import read_csv, read_table, read_text
from mnist_pipeline.params import Params, flatten
from mnist_pipeline.recipes import Study, load_studies, tabulate

Row = dict[str, float]
EXAMPLES = 5  # test images that the chart of corruptions shows


@dataclass(frozen=True)
class Results:
    """What there is to report.

    The earlier stages wrote rows for epochs, test images, bins of confidence and corruptions, and the test metrics;
    `mnist study` the studies of recipes.
    """

    history: list[Row]
    metrics: dict[str, Any]
    predictions: list[Row]
    calibration: list[Row]
    robustness: list[dict[str, Any]]
    studies: list[Study]

    @property
    def misclassified(self) -> list[Row]:
        """The wrong predictions, the most confident first."""
        wrong = [row for row in self.predictions if row["prediction"] != row["label"]]
        return sorted(wrong, key=lambda row: (-row["probability"], row["index"]))

    @property
    def uncorrupted(self) -> dict[str, Any]:
        """A row like those of the corruptions, of the test images as they are."""
        return {
            "corruption": "none",
            "family": "uncorrupted",
            **{name: self.metrics[f"test_{name}"] for name in SCORES},
        }

    @property
    def family_means(self) -> dict[str, dict[str, float]]:
        """The mean scores of each family of corruptions."""
        return family_means(self.robustness)

    @property
    def confusion(self) -> np.ndarray:
        """Counts (10, 10) of the labels (rows) by prediction (columns)."""
        counts = np.zeros((CLASSES, CLASSES), dtype=int)
        for row in self.predictions:
            counts[int(row["label"]), int(row["prediction"])] += 1
        return counts


def load_results(
    history: Path, metrics: Path, predictions: Path, calibration: Path, robustness: Path, studies: Path
) -> Results:
    """Read what the earlier stages and the studies wrote.

    Raises:
        UserError: a file is absent.
    """
    return Results(
        read_csv(history),
        json.loads(read_text(metrics)),
        read_csv(predictions),
        read_csv(calibration),
        [row | {name: float(row[name]) for name in SCORES} for row in read_table(robustness)],
        load_studies(studies),
    )


@dataclass(frozen=True)
class Comparison:
    """A figure of ours beside the published one, both as text."""

    name: str
    ours: str
    published: str


def compare(results: Results, monitor_name: str) -> list[Comparison]:
    """Set the main figures beside the specification's."""
    first, last = results.history[0], results.history[-1]
    best = max(results.history, key=lambda row: row["monitor_accuracy"])
    published = [correct / specification.TEST_IMAGES for correct in specification.TEST_CORRECT]
    best_published = max(range(len(published)), key=published.__getitem__)
    monitor = monitor_name.lower()
    return [
        Comparison("Final test accuracy", f"{results.metrics['test_accuracy']:.2%}", f"{published[-1]:.2%}"),
        Comparison(
            f"Best {monitor} accuracy",
            f"{best['monitor_accuracy']:.2%} (epoch {best['epoch']:.0f})",
            f"{published[best_published]:.2%} (epoch {best_published + 1})",
        ),
        Comparison(f"{monitor_name} accuracy after epoch 1", f"{first['monitor_accuracy']:.2%}", f"{published[0]:.2%}"),
        Comparison(
            f"{monitor_name} loss, first to last epoch",
            f"{first['monitor_loss']:.4f} → {last['monitor_loss']:.4f}",
            f"{specification.TEST_LOSS[0]:.4f} → {specification.TEST_LOSS[-1]:.4f}",
        ),
        Comparison(
            "Misclassified test images",
            f"{results.metrics['test_misclassified']:,} of {results.metrics['test_total']:,}",
            f"{specification.TEST_IMAGES - specification.TEST_CORRECT[-1]} of {specification.TEST_IMAGES:,}",
        ),
        Comparison("Parameters", f"{results.metrics['parameters']:,}", f"{specification.PARAMETERS:,}"),
        Comparison(
            "Weights, 4 bytes each",
            f"{results.metrics['parameters'] * 4 / 1024:.0f} KiB",
            f"about {specification.MODEL_KB} KB",
        ),
    ]


def compare_progress(history: Sequence[Row]) -> list[Comparison]:
    """Set how the monitor moved, over each stretch of one learning rate and overall, beside the specification."""
    published = [correct / specification.TEST_IMAGES for correct in specification.TEST_CORRECT]
    comparisons = []
    for rate, group in groupby(history, key=lambda row: row["learning_rate"]):
        rows = list(group)
        first, last = int(rows[0]["epoch"]), int(rows[-1]["epoch"])
        comparisons.append(
            Comparison(
                f"Accuracy in epochs {first} to {last}, learning rate {rate:g}",
                percentages([row["monitor_accuracy"] for row in rows]),
                percentages(published[first - 1 : last]),
            )
        )
    losses = [row["monitor_loss"] for row in history]
    return [*comparisons, Comparison("Loss reduction", reduction(losses), reduction(specification.TEST_LOSS))]


def percentages(accuracies: Sequence[float]) -> str:
    """Say between which two accuracies a stretch of epochs moved."""
    return f"{min(accuracies):.2%} to {max(accuracies):.2%}" if accuracies else ""


def reduction(losses: Sequence[float]) -> str:
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
    published = specification.TEST_CORRECT[-1] / specification.TEST_IMAGES
    error = math.sqrt(published * (1 - published) * (1 / test + 1 / specification.TEST_IMAGES))
    return [
        Requirement(
            "Parameter constraint",
            parameters < params.model.parameter_budget,
            f"{parameters:,} parameters, under {params.model.parameter_budget:,}",
        ),
        Requirement(
            "MNIST dataset",
            (train, test) == (specification.TRAIN_IMAGES, specification.TEST_IMAGES),
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
            accuracy >= published - 2 * error,
            f"{accuracy:.2%} on the test images; {published:.2%} published; "
            f"two standard errors of their difference are {2 * error:.2%}",
        ),
        Requirement(
            "Modern techniques",
            {"AdaptiveAvgPool2d", "BatchNorm2d"} <= set(kinds) and any("Dropout" in kind for kind in kinds),
            "global average pooling, dropout, batch normalisation",
        ),
        Requirement(
            "Fast training",
            accuracy >= published - 2 * error and len(results.history) <= len(specification.TEST_CORRECT),
            f"that accuracy in {len(results.history)} epochs; {len(specification.TEST_CORRECT)} published",
        ),
        Requirement(
            "Documentation",
            parameters == results.metrics["parameters"],
            f"this report accounts for {parameters:,} of {results.metrics['parameters']:,} parameters",
        ),
    ]


def steps_by_block(layers: Sequence[Layer]) -> dict[str, list[list[Layer]]]:
    """Group the layers of each block into steps: a convolution or a pooling with the pointwise layers behind it."""
    blocks: dict[str, list[list[Layer]]] = {}
    for layer in layers:
        steps = blocks.setdefault(layer.block, [])
        if "Conv" in layer.kind or "Pool" in layer.kind or not steps:
            steps.append([])
        steps[-1].append(layer)
    return blocks


def draw_charts(
    results: Results, layers: Sequence[Layer], model: nn.Module, params: Params, test: Digits
) -> dict[str, Chart]:
    """Draw the report's charts, each under its name."""
    published = {
        "loss": specification.TEST_LOSS,
        "accuracy": [correct / specification.TEST_IMAGES for correct in specification.TEST_CORRECT],
    }
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    shown = test[:EXAMPLES]
    examples = {corruption.name: corruption.apply(shown).pixels.numpy() for corruption in CORRUPTIONS}
    examples[results.uncorrupted["corruption"]] = shown.pixels.numpy()
    studied = {study.name: study.values("test_accuracy") for study in results.studies}
    return {
        **{
            quantity: draw_learning_curve(results.history, quantity, params.data.monitor_name, values)
            for quantity, values in published.items()
        },
        "network": draw_network([step for steps in steps_by_block(layers).values() for step in steps]),
        "filters": draw_filters(first.weight.detach().numpy()[:, 0]),
        "confusion_matrix": draw_confusion_matrix(results.confusion),
        "reliability": draw_reliability(results.calibration),
        "corruptions": draw_robustness(
            [results.uncorrupted, *results.robustness],
            {family: means["accuracy"] for family, means in results.family_means.items()},
            examples,
        ),
        **({"studies": draw_studies(studied, published["accuracy"][-1])} if studied else {}),
    }


def write_figures(
    directory: Path,
    charts: Mapping[str, Chart],
    test: Digits,
    misclassified: Sequence[Row],
) -> None:
    """Fill a directory with the charts and the misclassified digits as PNG files, in place of what it held."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, chart in tqdm(charts.items(), desc="Drawing", unit="chart", delay=2, leave=False, disable=None):
        write_chart(directory / f"{name}.png", chart)
    for row in misclassified:
        write_digit(directory / "misclassified" / f"{row['index']:.0f}.png", test.pixels[int(row["index"])].numpy())


def render_report(
    params: Params,
    digits: Mapping[str, Digits],
    layers: Sequence[Layer],
    results: Results,
    digests: Mapping[str, str],
) -> str:
    """Return the report as Markdown, of the `train`, `added` and `test` images and the SHA-256 (`digests`) of files."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_pipeline"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (Markdown, of our own numbers; `page` escapes it)
    )
    added, test = digits["added"], digits["test"]
    training = digits["train"] + added
    confused = results.confusion - np.diag(results.confusion.diagonal())
    return environment.get_template("report.md.j2").render(
        params=params,
        configuration=flatten(params.model_dump()),
        digests=digests,
        training=training,
        added=added,
        test=test,
        disputed=test.disputed(),
        side=SIDE,
        bins=BINS,
        layers=layers,
        blocks=steps_by_block(layers),
        channels=[1, *(layer.output_shape[0] for layer in layers if layer.kind == "Conv2d")],
        results=results,
        monitor=params.data.monitor_name,
        recipes=tabulate(results.studies),
        comparisons=compare(results, params.data.monitor_name),
        progress=compare_progress(results.history),
        requirements=check_requirements(params, layers, results, len(training), len(test)),
        confusions=[
            (int(label), int(prediction), int(confused[label, prediction]))
            for label, prediction in zip(
                *np.unravel_index(np.argsort(-confused, axis=None, kind="stable"), confused.shape), strict=True
            )
            if confused[label, prediction]
        ][:5],
        published=specification,
    )
