"""The report as Markdown, with its charts and pictures; `page` turns it into a web page."""

import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import jinja2
from torch import nn
from tqdm import tqdm

from mnist_pipeline.common.params import Params, flatten
from mnist_pipeline.data.digits import SIDE, Digits
from mnist_pipeline.evaluation.corruptions import CORRUPTIONS
from mnist_pipeline.evaluation.disputed import disputed_images
from mnist_pipeline.evaluation.metrics import BIN_COUNT
from mnist_pipeline.model.architecture import group_into_steps, list_layers
from mnist_pipeline.report import charts, network_charts, published
from mnist_pipeline.report.chart_style import Chart, write_chart
from mnist_pipeline.report.comparison import check_requirements, compare_progress, compare_results, count_of
from mnist_pipeline.report.network_charts import square
from mnist_pipeline.report.results import Results
from mnist_pipeline.report.studies import recipe_table

_EXAMPLES = 5  # test images that the chart of corruptions shows


def draw_charts(results: Results, model: nn.Module, params: Params, digits: Mapping[str, Digits]) -> dict[str, Chart]:
    """Draw the report's charts, by name; without published figures if the data are not MNIST's."""
    layers, monitor, test = list_layers(model), params.data.monitor_name, digits["test"]
    losses, accuracies = (published.TEST_LOSS, published.TEST_ACCURACY) if _are_mnist(digits) else ([], [])
    shown = test[:_EXAMPLES]
    examples = {corruption.name: corruption.apply(shown).pixels.numpy() for corruption in CORRUPTIONS}
    examples[results.uncorrupted["corruption"]] = shown.pixels.numpy()
    means = {family: scores["accuracy"] for family, scores in results.family_means.items()}
    drawn = {
        "loss": charts.draw_learning_curve(results.history, "loss", monitor, losses),
        "accuracy": charts.draw_learning_curve(results.history, "accuracy", monitor, accuracies),
        "network": network_charts.draw_network([*chain(*(steps for _, steps in group_into_steps(layers)))]),
        "confusion_matrix": charts.draw_confusion_matrix(results.confusion, results.classes),
        "reliability": charts.draw_reliability(results.calibration),
        "corruptions": charts.draw_robustness([results.uncorrupted, *results.robustness], means, examples),
    }
    first = next(layer for layer in layers if layer.parameters)
    if first.kind == "Conv2d":
        weights = model.get_parameter(f"{first.path}.weight")
        drawn["filters"] = network_charts.draw_filters(weights.detach().numpy()[:, 0])
    if shown_mistakes := results.misclassified[: params.report.gallery_size]:
        pixels = test.pixels[[int(row["index"]) for row in shown_mistakes]].numpy()
        drawn["misclassified"] = charts.draw_misclassified(shown_mistakes, pixels, disputed_images(test))
    if results.studies:
        studied = {study.name: study.values("test_accuracy") for study in results.studies}
        drawn["studies"] = charts.draw_studies(studied, accuracies)
    return drawn


def _are_mnist(digits: Mapping[str, Digits]) -> bool:
    return all(digits[part].is_mnist(part) for part in ("train", "test"))


def write_figures(directory: Path, drawn: Mapping[str, Chart]) -> None:
    """Replace the content of a directory with the charts as PNG files."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, chart in tqdm(drawn.items(), desc="Drawing", unit="chart", delay=2, leave=False, disable=None):
        write_chart(directory / f"{name}.png", chart)


def render_report(
    params: Params, digits: Mapping[str, Digits], model: nn.Module, results: Results, digests: Mapping[str, str]
) -> str:
    """Render the report as Markdown; the same input gives the same text.

    `digits` are the `train`, `added` and `test` images; `digests` are the SHA-256 of files, by path.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_pipeline.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (Markdown with our own numbers; `page` escapes it)
    )
    environment.filters |= {"percent": "{:.2%}".format, "thousands": "{:,}".format, "square": square}
    environment.globals["count_of"] = count_of
    layers = list_layers(model)
    blocks = group_into_steps(layers)
    training, test, is_mnist = digits["train"] + digits["added"], digits["test"], _are_mnist(digits)
    return environment.get_template("report.md.j2").render(
        params=params,
        configuration=flatten(params.model_dump()),
        digests=digests,
        training=training,
        added=digits["added"],
        test=test,
        is_mnist=is_mnist,
        is_published=is_mnist
        and {step[0].name for _, steps in blocks for step in steps} == {*published.STEP_PARAMETERS},
        disputed=disputed_images(test),
        side=SIDE,
        bins=BIN_COUNT,
        layers=layers,
        blocks=blocks,
        results=results,
        monitor=params.data.monitor_name,
        recipes=recipe_table(results.studies),
        comparisons=compare_results(results, params.data.monitor_name),
        progress=compare_progress(results.history),
        requirements=check_requirements(params, layers, results, len(training), len(test), is_mnist),
        published=published,
    )
