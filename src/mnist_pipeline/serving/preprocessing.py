"""Bring any picture of a digit to MNIST's form: white on black, scaled and centred in 28×28 pixels."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mnist_pipeline.data.digits import DIGITS, SIDE
from mnist_pipeline.serving.ink import find_bounds
from mnist_pipeline.serving.surroundings import find_digit

_BOX = 20  # pixels: a digit is scaled to fit a square of this side
_LONGEST = 500  # pixels: the longer side of a picture is shrunk to this
_SHRINK = Image.Resampling.BOX
_FAINT = 0.12  # of the strongest ink: a digit's extent leaves out paler ink, such as JPEG's fringes
_ROUNDING = 1e-5  # pixels: a sum of floats may be off by this


def to_mnist_image(image: Image.Image) -> NDArray[np.uint8]:
    """Bring the digit in a picture of any size, mode and colours to MNIST's form: (28, 28), 0 to 255.

    `find_digit` says what is taken for the digit. It is scaled to fit 20×20 pixels and keeps its aspect ratio;
    anti-aliasing gives grey levels. Its centre of mass comes to the middle of 28×28 (LeCun et al., 1998,
    doi:10.1109/5.726791; yann.lecun.com/exdb/mnist).

    Raises:
        UserError: the picture holds no digit, or more than one.
    """
    return _place_digit(find_digit(simplify_image(image)))


def to_network_image(image: Image.Image, classes: Sequence[str]) -> NDArray[np.uint8]:
    """Bring a picture of a digit to MNIST's form; make any other one just grey and small: (28, 28), 0 to 255."""
    if list(classes) == DIGITS:
        return to_mnist_image(image)
    image = simplify_image(image)
    return np.asarray(image.convert("RGBA" if image.mode == "RGBa" else "L").convert("L").resize((SIDE, SIDE), _SHRINK))


def simplify_image(image: Image.Image) -> Image.Image:
    """Return a picture upright, at most 500 pixels long, in mode L, RGB, RGBa (multiplied by alpha) or F."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = image.convert("F")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = image.convert("RGB" if image.getchannel("A").getextrema() == (255, 255) else "RGBa")
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.thumbnail((_LONGEST, _LONGEST), _SHRINK)
    if image.mode == "RGB" and len({band.tobytes() for band in image.split()}) == 1:
        image = image.getchannel("R")  # grey: one channel takes half the time of three
    if image.mode == "F":  # floats have no fixed range
        values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0).astype(np.float64)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray((values - low) * (255 / (high - low or 1)))
    return image


def _place_digit(ink: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale a digit's ink (height, width) to fit 20×20 and set its centre of mass in the middle of 28×28."""
    bounds = find_bounds(ink > _FAINT * ink.max())
    scale = _BOX / max(part.stop - part.start for part in bounds)
    corner = []
    for axis, part in enumerate(bounds):
        mass = ink.sum(axis=1 - axis, dtype=np.float64)
        centre = float(mass @ (np.arange(len(mass)) + 0.5)) / float(mass.sum())
        # A digit lies on whole pixels, its centre of mass up to 1 beyond the middle, as all but two of MNIST's 70,000.
        first = math.ceil(SIDE / 2 - scale * (centre - part.start) - _ROUNDING)
        last = SIDE - math.ceil(scale * (part.stop - part.start) - _ROUNDING)  # so that the digit's end fits
        corner.append(part.start - min(max(first, 0), last) / scale)
    (top, left), side = corner, SIDE / scale
    y, x = math.floor(top), math.floor(left)
    square = Image.fromarray(ink).crop((x, y, math.ceil(left + side), math.ceil(top + side)))
    box = (left - x, top - y, left - x + side, top - y + side)
    placed = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX, box))
    pixels: NDArray[np.uint8] = np.rint(placed * (255 / placed.max())).clip(0, 255).astype(np.uint8)
    return pixels
