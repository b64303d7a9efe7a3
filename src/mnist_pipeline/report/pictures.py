"""Digits and other pictures as PNG files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mnist_pipeline.common.files import write_bytes

_SCALE = 4  # enlarged pixels for each pixel, along each side


def enlarge(pixels: np.ndarray) -> Image.Image:
    """Enlarge pixels (height, width) and invert them: bright on dark becomes dark on bright."""
    image = Image.fromarray(255 - pixels)
    return image.resize((_SCALE * image.width, _SCALE * image.height), Image.Resampling.NEAREST)


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image, whole or not at all."""
    write_bytes(path, encode_png(image))


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()
