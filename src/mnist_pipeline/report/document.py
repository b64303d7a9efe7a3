"""The report as Markdown, with its charts and pictures; `page` makes a page of it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from torch import nn
from tqdm import tqdm

from mnist_pipeline.common.params import Params, flatten
from mnist_pipeline.data.digits import SIDE, Digits
from mnist_pipeline.evaluation.corruptions import CORRUPTIONS
from mnist_pipeline.evaluation.disputed import disputed_images
from mnist_pipeline.evaluation.metrics import BIN_COUNT
from mnist_pipeline.report import published
from mnist_pipeline.report.architecture import Layer, group_into_steps
from mnist_pipeline.report.chart_style import Chart, write_chart
from mnist_pipeline.report.charts import (
    draw_confusion_matrix,
    draw_learning_curve,
    draw_reliability,
    draw_robustness,
    draw_studies,
)
from mnist_pipeline.report.comparison import check_requirements, compare_progress, compare_results
from mnist_pipeline.report.network_charts import draw_filters, draw_network
from mnist_pipeline.report.pictures import write_digit
from mnist_pipeline.report.results import ResultRow, Results
from mnist_pipeline.report.studies import recipe_table

EXAMPLES = 5  # test images that the chart of corruptions shows


def draw_charts(
    results: Results, layers: Sequence[Layer], model: nn.Module, params: Params, test: Digits
) -> dict[str, Chart]:
    """Draw the report's charts, each under its name."""
    curves = {
        "loss": published.TEST_LOSS,
        "accuracy": [correct / published.TEST_IMAGES for correct in published.TEST_CORRECT],
    }
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    shown = test[:EXAMPLES]
    examples = {corruption.name: corruption.apply(shown).pixels.numpy() for corruption in CORRUPTIONS}
    examples[results.uncorrupted["corruption"]] = shown.pixels.numpy()
    studied = {study.name: study.values("test_accuracy") for study in results.studies}
    return {
        **{
            quantity: draw_learning_curve(results.history, quantity, params.data.monitor_name, values)
            for quantity, values in curves.items()
        },
        "network": draw_network([step for steps in group_into_steps(layers).values() for step in steps]),
        "filters": draw_filters(first.weight.detach().numpy()[:, 0]),
        "confusion_matrix": draw_confusion_matrix(results.confusion),
        "reliability": draw_reliability(results.calibration),
        "corruptions": draw_robustness(
            [results.uncorrupted, *results.robustness],
            {family: means["accuracy"] for family, means in results.family_means.items()},
            examples,
        ),
        **({"studies": draw_studies(studied, curves["accuracy"][-1])} if studied else {}),
    }


def write_figures(
    directory: Path,
    charts: Mapping[str, Chart],
    test: Digits,
    misclassified: Sequence[ResultRow],
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
        loader=jinja2.PackageLoader("mnist_pipeline.report"),
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
        disputed=disputed_images(test),
        side=SIDE,
        bins=BIN_COUNT,
        layers=layers,
        blocks=group_into_steps(layers),
        channels=[1, *(layer.output_shape[0] for layer in layers if layer.kind == "Conv2d")],
        results=results,
        monitor=params.data.monitor_name,
        recipes=recipe_table(results.studies),
        comparisons=compare_results(results, params.data.monitor_name),
        progress=compare_progress(results.history),
        requirements=check_requirements(params, layers, results, len(training), len(test)),
        confusions=[
            (int(label), int(prediction), int(confused[label, prediction]))
            for label, prediction in zip(
                *np.unravel_index(np.argsort(-confused, axis=None, kind="stable"), confused.shape), strict=True
            )
            if confused[label, prediction]
        ][:5],
        published=published,
    )
