"""The pictures beside the comment: both runs' charts side by side, and the digits whose prediction changed."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mnist_pipeline.common.paths import FIGURES, RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.promotion.ci_report.differences import Retraining
from mnist_pipeline.report.pictures import enlarge, write_png

_CHARTS = ("accuracy", "loss", "confusion_matrix", "reliability")
_MOST_DIGITS = 100  # in one picture
_CAPTION = 14  # pixels, height of its letters


def write_pictures(directory: Path, run: Retraining) -> None:
    """Fill a directory with both runs' charts and with the new and the mended mistakes, as PNG files."""
    shutil.rmtree(directory, ignore_errors=True)
    states = {"base": run.base, "this run": run.head}
    for name in _CHARTS:
        files = {title: state.directory / FIGURES / f"{name}.png" for title, state in states.items() if state}
        charts = [(title, Image.open(file)) for title, file in files.items() if file.is_file()]
        if charts:
            _write_sheet(directory / f"{name}.png", charts, columns=2)
    for kind, pairs in (run.changed_mistakes() or {}).items():
        if pairs:
            test = load_digits(RAW, "test")
            wrong = [old if kind == "mended" else new for old, new in pairs[:_MOST_DIGITS]]
            captions = [f"{row['index']:.0f}: {row['label']} as {row['prediction']}" for row in wrong]
            digits = [enlarge(test.pixels[int(row["index"])].numpy()) for row in wrong]
            _write_sheet(directory / f"{kind}.png", list(zip(captions, digits, strict=True)), columns=10)


def _write_sheet(path: Path, pictures: Sequence[tuple[str, Image.Image]], columns: int) -> None:
    width = max(image.width for _, image in pictures) + _CAPTION
    height = max(image.height for _, image in pictures) + 2 * _CAPTION
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (caption, image) in enumerate(pictures):
        left, top = place % columns * width + _CAPTION // 2, place // columns * height
        pen.text((left, top), caption, "black", ImageFont.load_default(_CAPTION))
        sheet.paste(image.convert("RGB"), (left, top + 3 * _CAPTION // 2))
    write_png(path, sheet.quantize(64))
