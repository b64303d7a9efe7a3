"""The pictures beside the comment: both runs' charts side by side, and the digits whose prediction changed."""

import shutil
from pathlib import Path

from PIL import Image

from mnist_pipeline.common.paths import FIGURES, RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.promotion.ci_report.differences import Retraining
from mnist_pipeline.report.pictures import enlarge, write_sheet

_CHARTS = ("accuracy", "loss", "confusion_matrix", "reliability")
_MOST_DIGITS = 100  # in one picture


def write_pictures(directory: Path, run: Retraining) -> None:
    """Fill a directory with both runs' charts and with the new and the mended mistakes, as PNG files."""
    shutil.rmtree(directory, ignore_errors=True)
    states = {"base": run.base, "this run": run.head}
    for name in _CHARTS:
        files = {title: state.directory / FIGURES / f"{name}.png" for title, state in states.items() if state}
        charts = [(title, Image.open(file)) for title, file in files.items() if file.is_file()]
        if charts:
            write_sheet(directory / f"{name}.png", charts, columns=2)
    for kind, pairs in (run.mistakes() or {}).items():
        if pairs:
            test = load_digits(RAW, "test")
            wrong = [old if kind == "mended" else new for old, new in pairs[:_MOST_DIGITS]]
            captions = [f"{row['index']:.0f}: {row['label']:.0f} as {row['prediction']:.0f}" for row in wrong]
            digits = [enlarge(test.pixels[int(row["index"])].numpy()) for row in wrong]
            write_sheet(directory / f"{kind}.png", list(zip(captions, digits, strict=True)), columns=10)
