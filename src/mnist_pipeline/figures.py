"""The report's pictures, as PNG files that the same run draws byte for byte again."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mnist_pipeline.data import CLASSES, Digits
from mnist_pipeline.files import write_bytes

TRAIN, MONITOR, PUBLISHED = "#9a6324", "#1f5fa8", "#808080"
mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False})


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG without the names and dates that would differ between two runs."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def draw_learning_curves(
    path: Path,
    history: Sequence[dict[str, float]],
    monitor_name: str,
    published_loss: Sequence[float],
    published_accuracy: Sequence[float],
) -> None:
    """Draw loss and accuracy by epoch, training, monitor and published; vertical lines mark the scheduler's steps."""
    figure = Figure(figsize=(11, 4))
    epochs = [row["epoch"] for row in history]
    steps = [row["epoch"] - 0.5 for before, row in pairwise(history) if row["learning_rate"] != before["learning_rate"]]
    published_epochs = range(1, len(published_loss) + 1)
    for axes, name, published in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), (published_loss, published_accuracy), strict=True
    ):
        for epoch in steps:
            axes.axvline(epoch, color="#d0d0d0", linestyle=":", zorder=0)
        axes.plot(published_epochs, published, color=PUBLISHED, linestyle="--", marker=".", label="test, published")
        axes.plot(epochs, [row[f"train_{name}"] for row in history], color=TRAIN, marker=".", label="training")
        axes.plot(
            epochs, [row[f"monitor_{name}"] for row in history], color=MONITOR, marker=".", label=monitor_name.lower()
        )
        axes.set_xlabel("epoch")
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss, accuracy = figure.axes
    loss.set_yscale("log")
    loss.set_ylabel("negative log-likelihood, nats an image")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    # The first epoch's training accuracy, far below the rest, would flatten all that matters.
    accuracy.set_ylim(bottom=min(row["monitor_accuracy"] for row in history) - 0.01)
    loss.legend(frameon=False)
    save(figure, path)


def draw_confusion_matrix(path: Path, confusion: np.ndarray) -> None:
    """Draw how often each label (row) was predicted as each class (column); the errors carry the colour."""
    figure = Figure(figsize=(6, 6))
    axes = figure.subplots()
    errors = confusion * (1 - np.eye(CLASSES))
    axes.imshow(errors, cmap="Reds", vmin=0, vmax=max(errors.max() * 1.5, 1))
    for label in range(CLASSES):
        for prediction in range(CLASSES):
            count = int(confusion[label, prediction])
            weight = "bold" if label == prediction else "normal"
            axes.text(prediction, label, str(count or "·"), ha="center", va="center", fontweight=weight, fontsize=9)
    axes.set_xticks(range(CLASSES))
    axes.set_yticks(range(CLASSES))
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(figure, path)


def draw_gallery(path: Path, digits: Digits, misclassified: Sequence[dict[str, float]]) -> None:
    """Draw misclassified test digits under what the network took them for, how surely, and their labels."""
    columns = 10
    rows = max(1, math.ceil(len(misclassified) / columns))
    figure = Figure(figsize=(columns * 1.15, rows * 1.5))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, row in zip(figure.axes, misclassified, strict=False):
        axes.imshow(digits.pixels[int(row["index"])].numpy(), cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(f"{row['label']:.0f} as {row['prediction']:.0f}\n{row['probability']:.1%}", fontsize=8)
    figure.subplots_adjust(hspace=0.6)
    save(figure, path)
