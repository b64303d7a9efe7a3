"""Any picture of a digit as MNIST would hold it: white on black, scaled and centred in 28×28 pixels."""

import io
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_pipeline.common.errors import UserError

SIDE = 28  # pixels, of an MNIST image
BOX = 20  # pixels, of the square within it that a digit is scaled to fit

MAX_PIXELS = 50_000_000  # of a picture that is decoded at all
FINE = 500  # pixels, that the longer side of a picture is shrunk to
COARSE = 100  # pixels or a little more, on which noise and dust are averaged away

BORDER = 0.85  # of the way from a picture's middle to its edge, beyond which there is rarely ink
DARK = 16  # levels of 255 that a background's brightness is taken to be at least, nearly
FAINTEST = 8  # levels of 255 by which ink differs from its background
FAINT = 0.12  # of the strongest ink: the extent of a digit does not go by paler ink, such as the fringes of JPEG
ROUNDING = 1e-5  # pixels, that a sum of floats may be off
MARGIN = 0.1  # of a digit's size: what is further off is no part of it

Array = NDArray[np.float32]


def open_image(source: Path | BinaryIO | bytes) -> Image.Image:
    """Decode the first frame of a picture in any format that Pillow reads, turned upright.

    A large JPEG is decoded at a fraction of its size, no smaller than `normalize` needs it.

    Raises:
        UserError: it is absent, no picture, damaged, or of more than MAX_PIXELS.
    """
    if not isinstance(source, Path):
        return decode(io.BytesIO(source) if isinstance(source, bytes) else source)
    try:
        with source.open("rb") as file:
            return decode(file)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def decode(file: BinaryIO) -> Image.Image:
    """Do what `open_image` does, with a file that is open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
            check(image)
            image.draft(None, (FINE, FINE))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        except UserError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise UserError(f"the picture is too large: up to {MAX_PIXELS:,} pixels are read") from None
        except UnidentifiedImageError:
            raise UserError("this is no picture in a known format, such as PNG or JPEG") from None
        except Exception as error:  # damaged bytes lead Pillow's decoders to errors of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the picture is damaged or incomplete, it cannot be decoded ({reason})") from None
    return image


def check(image: Image.Image) -> None:
    """Refuse a picture that should not be decoded, going by its header.

    Raises:
        UserError: it has no pixels or too many, or is a program, as PostScript is.
    """
    if image.format == "EPS":
        raise UserError("the picture is PostScript, which is not run: convert it to PNG")
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UserError(f"the picture has {image.width:,}×{image.height:,} pixels: 1 to {MAX_PIXELS:,} are read")


def normalize(image: Image.Image) -> NDArray[np.uint8]:
    """Return the digit in a picture of any size, mode and colours as MNIST would hold it: (28, 28), 0 to 255.

    The digit is what differs most from the background, whose light may be uneven. It is scaled to fit 20×20 pixels
    with its aspect ratio, its grey levels coming from anti-aliasing, and placed with its centre of mass in the middle
    of 28×28 (LeCun et al., 1998, doi:10.1109/5.726791; yann.lecun.com/exdb/mnist).

    Raises:
        UserError: nothing in the picture stands out from its background.
    """
    return place(find_ink(simplify(image)))


def simplify(image: Image.Image) -> Image.Image:
    """Return a picture upright, of FINE pixels at most, in mode L, RGB, RGBa (multiplied by alpha) or F."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = image.convert("F")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = image.convert("RGB" if image.getchannel("A").getextrema() == (255, 255) else "RGBa")
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.thumbnail((FINE, FINE), Image.Resampling.BOX)
    if image.mode == "RGB" and len({band.tobytes() for band in image.split()}) == 1:
        image = image.getchannel("R")  # grey: one channel takes half the time of three
    if image.mode == "F":  # the mode does not tell its range
        values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0).astype(np.float64)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray((values - low) * (255 / (high - low or 1)))
    return image


def find_ink(image: Image.Image) -> Array:
    """Return how much ink is in each pixel (height, width) of the part of a simplified picture that holds a digit.

    Ink that anti-aliasing mixes with its background lies on the line between both colours, of which alpha is a part:
    black ink, too, stands out from a transparent background. How far along the line a pixel lies is its ink.

    Raises:
        UserError: there is none.
    """
    pixels = to_array(image.reduce(max(1, max(image.size) // COARSE)))
    background = fit_background(pixels)
    difference = pixels - np.moveaxis(surface(background, *pixels.shape[:2]), 0, 2)
    # The cube makes it the line, and the direction on it, of what differs most.
    direction = np.square(length(difference)).ravel() @ difference.reshape(-1, difference.shape[2])
    direction /= np.linalg.norm(direction) or 1
    coarse = difference @ direction
    if coarse.max() < max(FAINTEST, 5 * noise(coarse)):
        raise UserError("the picture holds no digit: nothing in it stands out from its background")
    coarse *= gain(background, *coarse.shape)
    peak = float(coarse.max())

    ink: Array = to_array(image) @ direction
    ink -= surface(np.tensordot(direction, background, 1), *ink.shape)
    ink *= gain(background, *ink.shape)
    while noise(ink) > peak / 20 and max(ink.shape) >= 2 * COARSE:
        ink = np.asarray(Image.fromarray(ink).reduce(2))
    # Dust is pale where it is averaged, thin lines are less so; noise must not count, faint as the ink may be.
    digit = ink[around(coarse > max(peak / 3, min(5 * noise(coarse), peak / 2)), *ink.shape)]
    floor = max(0.5, min(5 * noise(ink), digit.max() / 2))  # less than half a level is but the rounding of floats
    return np.where(digit < floor, np.float32(0), digit)


def to_array(image: Image.Image) -> Array:
    """Return the pixels (height, width, channels)."""
    return np.asarray(image, np.float32).reshape(image.height, image.width, -1)


def fit_background(pixels: Array) -> Array:
    """Fit a biquadratic surface to each channel of pixels (height, width, channels), without what stands out from it.

    It is fitted again and again to the pixels near the last surface, from two starts: the pixels near the median of
    the outermost ones, and a broad border. The surface that lies nearer to a quarter of the pixels is taken, since ink
    may cover more than half. Returns the coefficients (channels, 3, 3) of the powers of y and x, for `surface`.
    """
    height, width, channels = pixels.shape
    step = 1 + max(height, width) // 50  # two thousand samples tell as much as all
    y, x = powers(height)[::step], powers(width)[::step]
    terms = np.kron(y, x).astype(np.float32)
    values = pixels[::step, ::step].reshape(len(terms), channels)
    outermost = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = length(values - np.median(outermost, axis=0))
    starts = [
        distance <= max(1, 3 * noise(distance)),
        np.logical_or.outer(*(np.abs(axis[:, 1]) >= BORDER * np.abs(axis[:, 1]).max() for axis in (y, x))).ravel(),
    ]
    fits = [refit(terms, values, start) for start in starts]
    best = min(fits, key=lambda fit: noise(length(values - terms @ fit)))
    return best.T.reshape(channels, 3, 3)


def refit(terms: Array, values: Array, near: NDArray[np.bool_]) -> Array:
    """Fit coefficients (terms, channels) to the values (N, channels) that are `near`, then to those near the fit."""
    for _ in range(8):
        chosen = terms[near]
        fit: Array = np.linalg.lstsq(chosen.T @ chosen, chosen.T @ values[near])[0].astype(np.float32)
        distance = length(values - terms @ fit)
        before, near = near, distance <= max(1, 3 * noise(distance))
        if np.array_equal(near, before):
            break
    return fit


def surface(coefficients: Array, height: int, width: int) -> Array:
    """Return biquadratic surfaces (…, height, width) of coefficients (…, 3, 3)."""
    values: Array = np.matmul(powers(height) @ coefficients, powers(width).T)
    return values


def gain(background: Array, height: int, width: int) -> Array:
    """Return the factor (height, width) by which contrasts in the shade are raised: light multiplies paper and ink."""
    brightness = surface(background.mean(axis=0), height, width).clip(min=0) + DARK
    factor: Array = brightness.mean() / brightness
    return factor


def powers(count: int) -> Array:
    """Return 1, x and x² (count, 3) at the centres of pixels that divide the range from -1 to 1."""
    x = (2 * np.arange(count, dtype=np.float32) + 1) / count - 1
    return np.stack([np.ones_like(x), x, x * x], axis=1)


def length(vectors: Array) -> Array:
    """Return the Euclidean length (…) of vectors (…, channels)."""
    squares: Array = np.einsum("...c,...c->...", vectors, vectors)
    return np.sqrt(squares)


def noise(values: Array) -> float:
    """Estimate the standard deviation of values that are zero but for noise, from the quarter nearest to zero."""
    sample = np.sort(np.abs(values.ravel()[:: 1 + values.size // 5000]))  # of thousands, which is quick
    return float(sample[len(sample) // 4]) / 0.3186  # the quartile of a standard normal distribution's magnitude


def extent(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the first row and the one after the last that have anything in them, then such columns."""
    lines = [np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1)]
    return [(int(line[0]), int(line[-1]) + 1) for line in lines]


def around(mask: NDArray[np.bool_], height: int, width: int) -> tuple[slice, ...]:
    """Return the rows and columns of a picture that hold what a coarse mask of it marks, with a margin."""
    bounds = extent(mask)
    reach = 1 + MARGIN * max(stop - start for start, stop in bounds)
    return tuple(
        slice(max(0, int((start - reach) * fine / coarse)), math.ceil((stop + reach) * fine / coarse))
        for (start, stop), fine, coarse in zip(bounds, (height, width), mask.shape, strict=True)
    )


def place(ink: Array) -> NDArray[np.uint8]:
    """Scale a digit's ink (height, width) to fit 20×20 and set its centre of mass in the middle of 28×28."""
    bounds = extent(ink > FAINT * ink.max())
    scale = BOX / max(stop - start for start, stop in bounds)
    corner = []
    for axis, (start, stop) in enumerate(bounds):
        mass = ink.sum(axis=1 - axis, dtype=np.float64)
        centre = float(mass @ (np.arange(len(mass)) + 0.5)) / float(mass.sum())
        # By whole pixels, and 0 to 1 beyond the middle: as in all of MNIST's 70,000 images but two.
        first = math.ceil(SIDE / 2 - scale * (centre - start) - ROUNDING)
        corner.append(start - min(max(first, 0), SIDE - math.ceil(scale * (stop - start) - ROUNDING)) / scale)
    (top, left), side = corner, SIDE / scale
    y, x = math.floor(top), math.floor(left)
    square = Image.fromarray(ink).crop((x, y, math.ceil(left + side), math.ceil(top + side)))
    box = (left - x, top - y, left - x + side, top - y + side)
    placed = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX, box))
    pixels: NDArray[np.uint8] = np.rint(placed * (255 / placed.max())).clip(0, 255).astype(np.uint8)
    return pixels
