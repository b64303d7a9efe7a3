"""A run with given mistakes, and its report, without a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import full

from mnist_pipeline.common.files import write_csv, write_json, write_text
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.data.digits import DIGITS as NUMBERS
from mnist_pipeline.data.digits import NO_DIGITS, Digits, load_digits
from mnist_pipeline.evaluation.corruptions import CORRUPTIONS
from mnist_pipeline.evaluation.metrics import (
    calibration_bins,
    compute_metrics,
    corrupted_accuracies,
    name_classes,
    prediction_rows,
)
from mnist_pipeline.model.network import build_model
from mnist_pipeline.model.networks.convolutional import Net
from mnist_pipeline.report.chart_style import Chart
from mnist_pipeline.report.document import draw_charts, render_report, write_figures
from mnist_pipeline.report.page import render_page
from mnist_pipeline.report.results import Results, load_results
from mnist_pipeline.report.studies import MEASURES, TEST_SHA256
from support import DATA, ROOT

PARAMS = load_params(ROOT / "params.yaml")
DIGITS = {part: load_digits(DATA, part) for part in ("train", "test")} | {"added": NO_DIGITS}
MISTAKES = {30: (8, 0.6), 5: (3, 0.95), 100: (7, 0.8)}  # test image: the prediction and its probability
DIGESTS = {"data/raw/images": "1" * 64, "models/model.safetensors": "2" * 64}


@dataclass(frozen=True)
class MadeUpRun:
    """The outputs of a run in a directory, and the report on it."""

    directory: Path
    params: Params
    digits: Mapping[str, Digits]
    results: Results

    @classmethod
    def create(
        cls,
        directory: Path,
        mistakes: Mapping[int, tuple[int, float]] = MISTAKES,
        epochs: int = 3,
        digits: Mapping[str, Digits] = DIGITS,
        params: Params = PARAMS,
        disputed: Sequence[int] = (),
        classes: Sequence[str] = NUMBERS,
    ) -> "MadeUpRun":
        """Write what the stages would write and read it; all other images are right with a probability of 0.91."""
        labels = digits["test"].labels
        probabilities = full((len(labels), 10), 0.01)
        probabilities[range(len(labels)), labels] = 0.91
        for index, (prediction, probability) in mistakes.items():
            probabilities[index] = (1 - probability) / 9
            probabilities[index, prediction] = probability
        history = [
            {
                "epoch": epoch,
                "learning_rate": 0.001 if epoch < 3 else 0.0005,
                "train_loss": 0.5 / epoch,
                "train_accuracy": 1 - 0.25 / epoch,
                "monitor_loss": 0.4 / epoch,
                "monitor_accuracy": 1 - 0.125 / epoch,
            }
            for epoch in range(1, epochs + 1)
        ]
        found = probabilities.log()
        robustness = [
            {
                "corruption": corruption.name,
                "family": corruption.family,
                "accuracy": 0.95 - number / 100,
                "loss": 0.2 + number / 10,
                "calibration_error": 0.01 + number / 1000,
            }
            for number, corruption in enumerate(CORRUPTIONS)
        ]
        metrics = compute_metrics(found, labels, disputed, classes) | corrupted_accuracies(robustness)
        metrics |= {"parameters": 19_210, "model_bytes": 81_432}
        write_csv(directory / "history.csv", history)
        write_json(directory / "metrics.json", metrics)
        write_csv(directory / "predictions.csv", name_classes(prediction_rows(found, labels), classes))
        write_csv(directory / "calibration.csv", calibration_bins(found, labels))
        write_csv(directory / "robustness.csv", robustness)
        seeds = [
            {
                **{
                    TEST_SHA256: digits["test"].sha256(),
                    "seed": seed,
                    "epochs": epochs,
                    "seconds": 90.0,
                    "test_accuracy": 0.99 + seed / 1000,
                },
                **{name: metrics[name] for name in MEASURES if name != "test_accuracy"},
            }
            for seed in range(3)
        ]
        write_csv(directory / "studies/specification.csv", seeds)
        names = ("history.csv", "metrics.json", "predictions.csv", "calibration.csv", "robustness.csv", "studies")
        return cls(directory, params, digits, load_results(*(directory / name for name in names)))

    @cached_property
    def model(self) -> Net:
        return build_model(PARAMS.model, seed=0)

    @cached_property
    def charts(self) -> dict[str, Chart]:
        return draw_charts(self.results, self.model, self.params, self.digits)

    @cached_property
    def report(self) -> str:
        return render_report(self.params, self.digits, self.model, self.results, DIGESTS)

    @cached_property
    def page(self) -> str:
        self.write_figures("figures")
        return render_page(self.report, self.directory, self.charts)

    def write_figures(self, name: str) -> dict[str, bytes]:
        """Write the figures into a directory of that name; return the content of its files by their paths in it."""
        directory = self.directory / name
        write_figures(directory, self.charts)
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(directory)): path.read_bytes() for path in files}

    def write_page(self) -> Path:
        """Write the page and return its path."""
        write_text(self.directory / "report.html", self.page)
        return self.directory / "report.html"


def params_with(section: str, **values: object) -> Params:
    """Return the real params with other values in a section."""
    return PARAMS.model_copy(update={section: getattr(PARAMS, section).model_copy(update=values)})
