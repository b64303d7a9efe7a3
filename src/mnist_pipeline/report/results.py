"""Read for the report what the earlier stages and the studies wrote."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnist_pipeline.common.files import read_csv, read_table, read_text
from mnist_pipeline.data.digits import CLASSES
from mnist_pipeline.evaluation.metrics import SCORES, family_means
from mnist_pipeline.report.studies import Study, load_studies

ResultRow = dict[str, float]  # a row of a table, by column


@dataclass(frozen=True)
class Results:
    """What the stages wrote: rows for epochs, metrics, rows for images, bins and corruptions; and the studies."""

    history: list[ResultRow]
    metrics: dict[str, Any]
    predictions: list[ResultRow]
    calibration: list[ResultRow]
    robustness: list[dict[str, Any]]
    studies: list[Study]

    @property
    def misclassified(self) -> list[ResultRow]:
        """The wrong predictions, the most confident first."""
        wrong = [row for row in self.predictions if row["prediction"] != row["label"]]
        return sorted(wrong, key=lambda row: (-row["probability"], row["index"]))

    @property
    def uncorrupted(self) -> dict[str, Any]:
        """The scores on the test images as they are, as a row like those of the corruptions."""
        scores = {name: self.metrics[f"test_{name}"] for name in SCORES}
        return {"corruption": "none", "family": "uncorrupted", **scores}

    @property
    def family_means(self) -> dict[str, dict[str, float]]:
        """The mean scores of each family of corruptions."""
        return family_means(self.robustness)

    @property
    def confusion(self) -> np.ndarray:
        """Counts (10, 10) of images by label (row) and prediction (column)."""
        counts = np.zeros((CLASSES, CLASSES), dtype=int)
        for row in self.predictions:
            counts[int(row["label"]), int(row["prediction"])] += 1
        return counts

    @property
    def mistakes(self) -> list[tuple[int, int, int]]:
        """The label, prediction and count of each kind of mistake, the most frequent first."""
        counts = Counter((int(row["label"]), int(row["prediction"])) for row in self.misclassified)
        return [(*kind, count) for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


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
