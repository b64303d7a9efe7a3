"""Bring any picture of a digit to MNIST's form: white on black, scaled and centred in 28×28 pixels."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.data.digits import DIGITS, SIDE

MAX_BYTES = 200_000_000  # of a picture's file
MAX_PIXELS = 50_000_000  # larger pictures are not decoded; Pillow holds each pixel in up to 4 bytes
_MAX_SIDE = 20_000  # pixels: a picture of one column costs ten times as much memory for each pixel
_MAX_SCANS = 100  # of a JPEG: it is decoded once for each of its scans, which may hold nothing
# Not every format that Pillow reads: some are decoded in Python or hold other files, whose size nothing limits.
_WANTED = ("AVIF", "BMP", "EPS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
Image.init()
PICTURE_FORMATS = [name for name in _WANTED if name in Image.OPEN]
_BOX = 20  # pixels: a digit is scaled to fit a square of this side
_FINE = 500  # pixels: the longer side of a picture is shrunk to this
_COARSE = 100  # pixels or a little more: at this size noise and dust are averaged away
_SHRINK = Image.Resampling.BOX
_MIDDLE = 0.85  # of the way from a picture's middle to its edge; beyond it there is rarely ink
_DARK = 16  # of 255 levels, added to a background's brightness, which may be 0
_FAINTEST_INK = 8  # of 255 levels: ink differs from its background at least by this
_FAINT = 0.12  # of the strongest ink: a digit's extent leaves out paler ink, such as JPEG's fringes
_ROUNDING = 1e-5  # pixels: a sum of floats may be off by this
_MARGIN = 0.1  # of a digit's size: what is further away is not part of it

_Array = NDArray[np.float32]


@contextmanager
def name_in_errors(name: object) -> Iterator[None]:
    """Turn errors about a file inside the block into a UserError that begins with its name."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def open_image(source: BinaryIO | bytes) -> Image.Image:
    """Decode the first frame of a picture in any format that Pillow reads, turned upright.

    A large JPEG is decoded at a fraction of its size, but no smaller than `to_mnist_image` needs it.

    Raises:
        UserError: it is not a picture, is damaged or too large.
    """
    content = source if isinstance(source, bytes) else source.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"the picture's file is too large: up to {MAX_BYTES:,} bytes are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
            if image.format == "EPS":
                raise UserError("the picture is PostScript, a program that is not run: convert it to PNG")
            _check_size(*image.size)
            if image.format == "JPEG" and content.count(b"\xff\xda") > _MAX_SCANS:
                raise UserError(f"the picture has more than {_MAX_SCANS} scans: save it as a baseline JPEG or as PNG")
            image.draft(None, (_FINE, _FINE))
            image.load()
            _check_size(*image.im.size)  # an icon's picture may be larger than the icon says
            ImageOps.exif_transpose(image, in_place=True)
        except UserError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise UserError(f"the picture is too large: up to {MAX_PIXELS:,} pixels are read") from None
        except UnidentifiedImageError:
            raise UserError("this is no picture in a known format, such as PNG or JPEG") from None
        except Exception as error:  # damaged bytes lead Pillow's decoders to errors of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the picture is damaged or incomplete: it cannot be decoded ({reason})") from None
    return image


def _check_size(width: int, height: int) -> None:
    """Raise a UserError if a picture of these sides is not to be decoded."""
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"the picture has {width:,}×{height:,} pixels: 1 to {MAX_PIXELS:,} are read")
    if max(width, height) > _MAX_SIDE:
        raise UserError(f"the picture has {width:,}×{height:,} pixels: sides of up to {_MAX_SIDE:,} are read")


def to_mnist_image(image: Image.Image) -> NDArray[np.uint8]:
    """Bring the digit in a picture of any size, mode and colours to MNIST's form: (28, 28), 0 to 255.

    The digit is what differs most from the background, whose light may be uneven. It is scaled to fit 20×20 pixels
    and keeps its aspect ratio; anti-aliasing gives grey levels. Its centre of mass comes to the middle of 28×28
    (LeCun et al., 1998, doi:10.1109/5.726791; yann.lecun.com/exdb/mnist).

    Raises:
        UserError: nothing in the picture stands out from its background.
    """
    return _place_digit(_find_ink(simplify_image(image)))


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
    image.thumbnail((_FINE, _FINE), _SHRINK)
    if image.mode == "RGB" and len({band.tobytes() for band in image.split()}) == 1:
        image = image.getchannel("R")  # grey: one channel takes half the time of three
    if image.mode == "F":  # floats have no fixed range
        values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0).astype(np.float64)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray((values - low) * (255 / (high - low or 1)))
    return image


def _find_ink(image: Image.Image) -> _Array:
    """Measure the ink in each pixel (height, width) of the part of a simplified picture that holds a digit.

    Anti-aliasing mixes the colours of ink and background, so each pixel's colour lies on the line between both. The
    distance from the background is its ink. Alpha is one more channel, so black ink stands out from transparency.

    Raises:
        UserError: there is no ink.
    """
    pixels = _to_array(image.reduce(max(1, max(image.size) // _COARSE)))
    background = _fit_background(pixels)
    difference = pixels - np.moveaxis(_evaluate(background, *pixels.shape[:2]), 0, 2)
    # The squares give the largest differences the most weight in the line's direction.
    direction = np.square(_lengths(difference)).ravel() @ difference.reshape(-1, difference.shape[2])
    direction /= np.linalg.norm(direction) or 1
    coarse = difference @ direction
    if coarse.max() < max(_FAINTEST_INK, 5 * _estimate_noise(coarse)):
        raise UserError("the picture holds no digit: nothing in it stands out from its background")
    coarse *= _brighten_shade(background, *coarse.shape)
    peak = float(coarse.max())

    ink: _Array = _to_array(image) @ direction
    ink -= _evaluate(np.tensordot(direction, background, 1), *ink.shape)
    ink *= _brighten_shade(background, *ink.shape)
    while _estimate_noise(ink) > peak / 20 and max(ink.shape) >= 2 * _COARSE:
        ink = np.asarray(Image.fromarray(ink).reduce(2))
    # Averaging makes dust paler than thin lines; noise must not count, however faint the ink is.
    digit = ink[_crop_around(coarse > max(peak / 3, min(5 * _estimate_noise(coarse), peak / 2)), *ink.shape)]
    floor = max(0.5, min(5 * _estimate_noise(ink), digit.max() / 2))  # rounding errors stay below half a level
    return np.where(digit < floor, np.float32(0), digit)


def _to_array(image: Image.Image) -> _Array:
    return np.asarray(image, np.float32).reshape(image.height, image.width, -1)  # height, width, channels


def _fit_background(pixels: _Array) -> _Array:
    """Fit a biquadratic surface to each channel of pixels (height, width, channels), ignoring what stands out from it.

    It starts from the pixels near the median of the outermost ones, and again from a broad border, and repeats the fit
    with the pixels near the last surface. It keeps the result that is closer to its nearest quarter of the pixels: ink
    may cover more than half. Returns the coefficients (channels, 3, 3) of the powers of y and x, for `_evaluate`.
    """
    height, width, channels = pixels.shape
    step = 1 + max(height, width) // 50  # two thousand samples are enough
    y, x = _powers(height)[::step], _powers(width)[::step]
    terms = np.kron(y, x).astype(np.float32)
    values = pixels[::step, ::step].reshape(len(terms), channels)
    outermost = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = _lengths(values - np.median(outermost, axis=0))
    starts = [
        distance <= max(1, 3 * _estimate_noise(distance)),
        np.logical_or.outer(*(np.abs(axis[:, 1]) >= _MIDDLE * np.abs(axis[:, 1]).max() for axis in (y, x))).ravel(),
    ]
    fits = [_refit(terms, values, start) for start in starts]
    best = min(fits, key=lambda fit: _estimate_noise(_lengths(values - terms @ fit)))
    return best.T.reshape(channels, 3, 3)


def _refit(terms: _Array, values: _Array, near: NDArray[np.bool_]) -> _Array:
    """Fit coefficients (terms, channels) to the values (N, channels) that are `near`, then to those near the fit."""
    for _ in range(8):
        chosen = terms[near]
        fit: _Array = np.linalg.lstsq(chosen.T @ chosen, chosen.T @ values[near])[0].astype(np.float32)
        distance = _lengths(values - terms @ fit)
        before, near = near, distance <= max(1, 3 * _estimate_noise(distance))
        if np.array_equal(near, before):
            break
    return fit


def _evaluate(coefficients: _Array, height: int, width: int) -> _Array:
    """Return the biquadratic surfaces (…, height, width) of coefficients (…, 3, 3)."""
    values: _Array = np.matmul(_powers(height) @ coefficients, _powers(width).T)
    return values


def _brighten_shade(background: _Array, height: int, width: int) -> _Array:
    """Return the factor (height, width) that raises contrasts in the shade: light multiplies paper and ink."""
    brightness = _evaluate(background.mean(axis=0), height, width).clip(min=0) + _DARK
    factor: _Array = brightness.mean() / brightness
    return factor


def _powers(count: int) -> _Array:
    """Return 1, x and x² (count, 3) at the centres of `count` equal pixels from -1 to 1."""
    x = (2 * np.arange(count, dtype=np.float32) + 1) / count - 1
    return np.stack([np.ones_like(x), x, x * x], axis=1)


def _lengths(vectors: _Array) -> _Array:
    """Return the Euclidean lengths (…) of vectors (…, channels)."""
    squares: _Array = np.einsum("...c,...c->...", vectors, vectors)
    return np.sqrt(squares)


def _estimate_noise(values: _Array) -> float:
    """Estimate the standard deviation of the noise from the quarter of the values nearest to zero."""
    sample = np.sort(np.abs(values.ravel()[:: 1 + values.size // 5000]))  # thousands are enough
    return float(sample[len(sample) // 4]) / 0.3186  # the quartile of a standard normal distribution's magnitude


def _find_bounds(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the first marked row and the one after the last, then the same for columns."""
    lines = [np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1)]
    return [(int(line[0]), int(line[-1]) + 1) for line in lines]


def _crop_around(mask: NDArray[np.bool_], height: int, width: int) -> tuple[slice, ...]:
    """Return the rows and columns of a picture (height, width) that its coarse mask marks, with a margin."""
    bounds = _find_bounds(mask)
    reach = 1 + _MARGIN * max(stop - start for start, stop in bounds)
    return tuple(
        slice(max(0, int((start - reach) * fine / coarse)), math.ceil((stop + reach) * fine / coarse))
        for (start, stop), fine, coarse in zip(bounds, (height, width), mask.shape, strict=True)
    )


def _place_digit(ink: _Array) -> NDArray[np.uint8]:
    """Scale a digit's ink (height, width) to fit 20×20 and set its centre of mass in the middle of 28×28."""
    bounds = _find_bounds(ink > _FAINT * ink.max())
    scale = _BOX / max(stop - start for start, stop in bounds)
    corner = []
    for axis, (start, stop) in enumerate(bounds):
        mass = ink.sum(axis=1 - axis, dtype=np.float64)
        centre = float(mass @ (np.arange(len(mass)) + 0.5)) / float(mass.sum())
        # Whole pixels, 0 to 1 of them beyond the middle, as in all but two of MNIST's 70,000 images.
        first = math.ceil(SIDE / 2 - scale * (centre - start) - _ROUNDING)
        corner.append(start - min(max(first, 0), SIDE - math.ceil(scale * (stop - start) - _ROUNDING)) / scale)
    (top, left), side = corner, SIDE / scale
    y, x = math.floor(top), math.floor(left)
    square = Image.fromarray(ink).crop((x, y, math.ceil(left + side), math.ceil(top + side)))
    box = (left - x, top - y, left - x + side, top - y + side)
    placed = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX, box))
    pixels: NDArray[np.uint8] = np.rint(placed * (255 / placed.max())).clip(0, 255).astype(np.uint8)
    return pixels
