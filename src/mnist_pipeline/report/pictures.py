"""Digits and sheets of pictures as PNG files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mnist_pipeline.common.files import write_bytes

_SCALE = 4  # times as wide and as high
_CAPTION = 14  # pixels, height of its letters


def write_digit(path: Path, pixels: np.ndarray) -> None:
    """Write a digit (28, 28), black on white, enlarged."""
    write_png(path, enlarge(pixels))


def enlarge(pixels: np.ndarray) -> Image.Image:
    """Return pixels (height, width), bright on dark, as a larger image that is dark on bright."""
    image = Image.fromarray(255 - pixels)
    return image.resize((_SCALE * image.width, _SCALE * image.height), Image.Resampling.NEAREST)


def write_sheet(path: Path, pictures: Sequence[tuple[str, Image.Image]], columns: int) -> None:
    """Write pictures with their captions into one picture on white, row by row."""
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


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image, whole or not at all."""
    write_bytes(path, encode_png(image))


def encode_png(image: Image.Image) -> bytes:
    """Return an image as a PNG file holds it."""
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()
