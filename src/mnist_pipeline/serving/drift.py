"""How the pictures that a service kept differ from the test images (`mnist drift`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_table
from mnist_pipeline.common.paths import PREDICTIONS
from mnist_pipeline.serving.kept import read_kept_pictures

_BOUNDS = [0.5, 0.8, 0.9, 0.99, 0.999]  # between the bins of probabilities
_RANGES = ["below 50%", "50% to 80%", "80% to 90%", "90% to 99%", "99% to 99.9%", "above 99.9%"]
_SAMPLES = 2000  # drawn at random, to learn how far chance alone drifts
_BAR = 30  # characters for 100%


@dataclass(frozen=True)
class Drift:
    """Two distributions, each a list of shares by name, and the distance between them.

    The distance (total variation) is the share of pictures that would have to change to make both the same: 0 is the
    same, 1 has nothing in common. Of 20 samples of as many test images, 19 have a distance of at most `chance`.
    """

    kept: dict[str, float]
    test: dict[str, float]
    distance: float
    chance: float


@dataclass(frozen=True)
class DriftReport:
    """The numbers of pictures and the drift of their probabilities and of their classes, as the network reads them.

    `right` is the share of the labelled pictures that were read right; None if none is labelled.
    """

    pictures: int
    labelled: int
    right: float | None
    test_right: float
    probabilities: Drift
    classes: Drift


def measure_drift(directory: Path, classes: Sequence[str]) -> DriftReport:
    """Compare the pictures in a directory of `mnist serve --keep` with the test images in reports/predictions.csv.

    Raises:
        UserError: there are no pictures, one is damaged, or the table is absent.
    """
    pictures = list(read_kept_pictures(directory, classes))
    if not pictures:
        raise UserError(f"{directory} has no pictures: `mnist serve --keep {directory}` keeps those that it reads")
    test = read_table(PREDICTIONS)
    answers = np.array([picture.probabilities for picture in pictures])
    labelled = [
        (picture.label, int(np.argmax(picture.probabilities))) for picture in pictures if picture.label is not None
    ]
    kept_bins = np.searchsorted(_BOUNDS, answers.max(axis=1), side="right")
    test_bins = np.searchsorted(_BOUNDS, [float(row["probability"]) for row in test], side="right")
    return DriftReport(
        len(pictures),
        len(labelled),
        sum(label == digit for label, digit in labelled) / len(labelled) if labelled else None,
        sum(row["label"] == row["prediction"] for row in test) / len(test),
        _compare(kept_bins, test_bins, _RANGES),
        _compare(answers.argmax(axis=1), np.array([int(row["prediction"]) for row in test]), classes),
    )


def _compare(kept: NDArray[np.int64], test: NDArray[np.int64], names: Sequence[str]) -> Drift:
    """Compare two samples of numbers below `len(names)`."""

    def shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(counts / counts.sum(axis=-1, keepdims=True), np.float64)

    kept_shares, test_shares = (shares(np.bincount(sample, minlength=len(names))) for sample in (kept, test))
    samples = shares(np.random.default_rng(0).multinomial(len(kept), test_shares, size=_SAMPLES))
    distances = np.abs(np.vstack([kept_shares, samples]) - test_shares).sum(axis=1) / 2
    return Drift(
        dict(zip(names, kept_shares.tolist(), strict=True)),
        dict(zip(names, test_shares.tolist(), strict=True)),
        float(distances[0]),
        float(np.quantile(distances[1:], 0.95)),
    )


def render_drift(report: DriftReport) -> str:
    """Write what `mnist drift` prints: two tables with bars."""
    right = (
        ""
        if report.right is None
        else f", {report.right:.1%} of them read right (test images: {report.test_right:.1%})"
    )
    return "\n\n".join(
        [
            f"{report.pictures:,} kept pictures, {report.labelled:,} with a label{right}",
            _render(report.probabilities, "probability"),
            _render(report.classes, "read as"),
        ]
    )


def _render(drift: Drift, title: str) -> str:
    rows = [
        (
            name,
            *(
                cell
                for share in (drift.kept[name], drift.test[name])
                for cell in (f"{share:.1%}", "█" * round(_BAR * share))
            ),
        )
        for name in drift.kept
    ]
    table = tabulate(
        rows,
        [title, "kept", "", "test", ""],
        tablefmt="plain",
        colalign=("left", "right", "left", "right", "left"),
        disable_numparse=True,
    )
    verdict = "more than chance makes" if drift.distance > drift.chance else "no more than chance makes"
    scale = "0 is the same, 1 has nothing in common"
    return f"{table}\nDrift {drift.distance:.2f}, {verdict} (up to {drift.chance:.2f}; {scale})"
