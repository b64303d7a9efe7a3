"""Read for the report what the earlier stages and the studies wrote."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mnist_pipeline.common.files import read_csv, read_table, read_text
from mnist_pipeline.data.digits import Digits
from mnist_pipeline.evaluation.metrics import SCORES, family_means
from mnist_pipeline.report.studies import Study, load_studies

ResultRow = dict[str, Any]  # a row of a table, by column: numbers and, of classes and corruptions, names


@dataclass(frozen=True)
class Results:
    """What the stages wrote: rows for epochs, metrics, rows for images, bins and corruptions; and the studies."""

    history: list[ResultRow]
    metrics: dict[str, Any]
    predictions: list[ResultRow]
    calibration: list[ResultRow]
    robustness: list[ResultRow]
    studies: list[Study]

    def with_studies_on(self, test: Digits) -> "Results":
        """Return these results without the studies that were tested on other images."""
        return replace(self, studies=[study for study in self.studies if study.is_tested_on(test)])

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of their labels."""
        return list(self.metrics["test_per_class_accuracy"])

    @property
    def misclassified(self) -> list[ResultRow]:
        """The wrong predictions, the most confident first."""
        wrong = [row for row in self.predictions if row["prediction"] != row["label"]]
        return sorted(wrong, key=lambda row: (-row["probability"], row["index"]))

    @property
    def uncorrupted(self) -> ResultRow:
        """The scores on the test images as they are, as a row like those of the corruptions."""
        scores = {name: self.metrics[f"test_{name}"] for name in SCORES}
        return {"corruption": "none", "family": "uncorrupted", **scores}

    @property
    def family_means(self) -> dict[str, dict[str, float]]:
        """The mean scores of each family of corruptions."""
        return family_means(self.robustness)

    @property
    def confusion(self) -> np.ndarray:
        """Counts (classes, classes) of images by label (row) and prediction (column)."""
        counts = Counter((row["label"], row["prediction"]) for row in self.predictions)
        return np.array([[counts[label, prediction] for prediction in self.classes] for label in self.classes])

    @property
    def mistakes(self) -> list[tuple[str, str, int]]:
        """The label, prediction and count of each kind of mistake, the most frequent first."""
        counts = Counter((row["label"], row["prediction"]) for row in self.misclassified)
        order = {name: label for label, name in enumerate(self.classes)}
        ranked = sorted(counts.items(), key=lambda item: (-item[1], *map(order.__getitem__, item[0])))
        return [(*kind, count) for kind, count in ranked]


def load_results(
    history: Path, metrics: Path, predictions: Path | None, calibration: Path, robustness: Path, studies: Path
) -> Results:
    """Read what the earlier stages and the studies wrote; `predictions` is None if they are lost.

    Raises:
        UserError: a file is absent.
    """
    return Results(
        read_csv(history),
        json.loads(read_text(metrics)),
        [
            row | {name: float(row[name]) for name in ("index", "probability")}
            for row in (read_table(predictions) if predictions else [])
        ],
        read_csv(calibration),
        [row | {name: float(row[name]) for name in SCORES} for row in read_table(robustness)],
        load_studies(studies),
    )
