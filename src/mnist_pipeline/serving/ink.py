"""Measure the ink in each pixel of a picture: how far it differs from a background that light makes uneven."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Bounds = tuple[slice, ...]  # rows, columns

_COARSE = 100  # pixels or a little more: at this size noise and dust are averaged away
_MIDDLE = 0.85  # of the way from a picture's middle to its edge; beyond it there is rarely ink
_DARK = 16  # of 255 levels, added to a background's brightness, which may be 0
_FAINTEST_INK = 8  # of 255 levels: ink differs from its background at least by this
_FAINTEST_LOCAL_INK = 25  # of 255 levels: a background of shadows leaves more that looks like ink
_FAINT = 0.12  # of the strongest ink: what is paler is not marked, such as JPEG's fringes
_MARGIN = 0.1  # of a digit's size: what is further away is not part of it


@dataclass(frozen=True)
class Ink:
    """The ink in a picture: `fine` (height, width) as large as the picture, `coarse` about 100 pixels long.

    `colour` (channels) is the direction from the background's colour to the ink's. Ink that is not `visible` may be
    noise.
    """

    fine: Array
    coarse: Array
    colour: Array
    visible: bool

    def mark(self) -> Mask:
        """Mark the pixels of `coarse` that hold ink."""
        return self.coarse > self._above_noise(_FAINT)

    def cut_out(self, kept: Mask) -> Array:
        """Return the ink (height, width) of the marks that are kept, with a margin; the other marks are erased."""
        ink, peak = self.fine, float(self.coarse[kept].max())
        while _estimate_noise(ink) > peak / 20 and max(ink.shape) >= 2 * _COARSE:
            ink = np.asarray(Image.fromarray(ink).reduce(2))
        # Averaging makes dust paler than thin lines.
        bounds = _widen(find_bounds(kept & (self.coarse > self._above_noise(1 / 3, peak))), kept.shape, ink.shape)
        foreign = Image.fromarray(self.mark() & ~kept).resize(ink.shape[::-1])
        digit = np.where(np.asarray(foreign)[bounds], np.float32(0), ink[bounds])
        floor = max(0.5, min(5 * _estimate_noise(ink), digit.max() / 2))  # rounding errors stay below half a level
        return np.where(digit < floor, np.float32(0), digit)

    def _above_noise(self, part: float, peak: float | None = None) -> float:
        """Return a part of the strongest ink, or more if there is noise, which must not count."""
        peak = peak or float(self.coarse.max())
        return max(part * peak, min(5 * _estimate_noise(self.coarse), peak / 2))


def measure_ink(image: Image.Image) -> Ink:
    """Measure the ink of a simplified picture on a background whose brightness changes smoothly.

    Anti-aliasing mixes the colours of ink and background, so each pixel's colour lies on the line between both. The
    distance from the background is its ink. Alpha is one more channel, so black ink stands out from transparency.
    """
    pixels = _to_array(_shrink(image))
    background = _fit_background(pixels)
    difference = pixels - np.moveaxis(_evaluate(background, *pixels.shape[:2]), 0, 2)
    # The squares give the largest differences the most weight in the line's direction.
    colour = np.square(_lengths(difference)).ravel() @ difference.reshape(-1, difference.shape[2])
    colour /= np.linalg.norm(colour) or 1
    coarse = difference @ colour
    visible = bool(coarse.max() >= max(_FAINTEST_INK, 5 * _estimate_noise(coarse)))
    fine: Array = _to_array(image) @ colour
    fine -= _evaluate(np.tensordot(colour, background, 1), *fine.shape)
    fine, coarse = (ink * _brighten_shade(background, *ink.shape) for ink in (fine, coarse))
    return Ink(fine, coarse, colour, visible)


def measure_local_ink(image: Image.Image, smooth: Ink, neighbourhood: float, dark: bool) -> Ink:
    """Measure the ink again, of which is known whether it is dark or light.

    Dark ink is compared with the lightest pixels around it, light ink with the darkest; `neighbourhood` says how far
    they may lie, as a part of the shorter side. So the edge of a shadow makes no ink, and ink may cover half of the
    picture.

    The background is a morphological closing (Serra, 1982, *Image Analysis and Mathematical Morphology*).
    """
    weights = np.abs(smooth.colour)
    coarse, fine = (_to_array(each) @ (weights / (weights.sum() or 1)) for each in (_shrink(image), image))
    if not dark:
        coarse, fine = 255 - coarse, 255 - fine
    side = max(3, round(neighbourhood * min(coarse.shape)))
    closed = ndimage.grey_closing(coarse, (side, side), mode="nearest")
    background = Image.fromarray(ndimage.grey_erosion(closed, (3, 3)))
    coarse, fine = (
        255 - 255 * (values + _DARK) / (np.asarray(_stretch(background, values.shape)) + _DARK)
        for values in (coarse, fine)
    )
    # At least a quarter of the picture is paper.
    paper = np.quantile(coarse, 0.25).astype(np.float32)
    visible = bool(coarse.max() - paper >= max(_FAINTEST_LOCAL_INK, 5 * _estimate_noise(coarse - paper)))
    return Ink(fine - paper, coarse - paper, smooth.colour, visible)


def corners_are_bright(image: Image.Image) -> bool:
    """Tell whether the corners are brighter than the rest: even a digit without a margin rarely fills them."""
    grey = _to_array(_shrink(image)).mean(axis=2)
    height, width = (max(1, size // 10) for size in grey.shape)
    return bool(grey[np.ix_(np.r_[:height, -height:0], np.r_[:width, -width:0])].mean() > grey.mean())


def _stretch(image: Image.Image, shape: tuple[int, ...]) -> Image.Image:
    height, width = shape
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _shrink(image: Image.Image) -> Image.Image:
    return image.reduce(max(1, max(image.size) // _COARSE))


def _to_array(image: Image.Image) -> Array:
    return np.asarray(image, np.float32).reshape(image.height, image.width, -1)  # height, width, channels


def _fit_background(pixels: Array) -> Array:
    """Fit a biquadratic surface to each channel of pixels (height, width, channels), ignoring what stands out from it.

    It fits twice: first to the pixels near the median of the outermost ones, then to a broad border. Each fit is
    repeated with the pixels near the last surface. Of both it keeps the surface that is closer to the quarter of the
    pixels nearest to it: a quarter, because ink may cover more than half. Returns the coefficients (channels, 3, 3) of
    the powers of y and x, for `_evaluate`.
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


def _refit(terms: Array, values: Array, near: Mask) -> Array:
    """Fit coefficients (terms, channels) to the values (N, channels) that are `near`, then to those near the fit."""
    for _ in range(8):
        chosen = terms[near]
        fit: Array = np.linalg.lstsq(chosen.T @ chosen, chosen.T @ values[near])[0].astype(np.float32)
        distance = _lengths(values - terms @ fit)
        before, near = near, distance <= max(1, 3 * _estimate_noise(distance))
        if np.array_equal(near, before):
            break
    return fit


def _evaluate(coefficients: Array, height: int, width: int) -> Array:
    """Return the biquadratic surfaces (…, height, width) of coefficients (…, 3, 3)."""
    values: Array = np.matmul(_powers(height) @ coefficients, _powers(width).T)
    return values


def _brighten_shade(background: Array, height: int, width: int) -> Array:
    """Return the factor (height, width) that raises contrasts in the shade: light multiplies paper and ink."""
    brightness = _evaluate(background.mean(axis=0), height, width).clip(min=0) + _DARK
    factor: Array = brightness.mean() / brightness
    return factor


def _powers(count: int) -> Array:
    """Return 1, x and x² (count, 3) at the centres of `count` equal pixels from -1 to 1."""
    x = (2 * np.arange(count, dtype=np.float32) + 1) / count - 1
    return np.stack([np.ones_like(x), x, x * x], axis=1)


def _lengths(vectors: Array) -> Array:
    """Return the Euclidean lengths (…) of vectors (…, channels)."""
    squares: Array = np.einsum("...c,...c->...", vectors, vectors)
    return np.sqrt(squares)


def _estimate_noise(values: Array) -> float:
    """Estimate the standard deviation of the noise from the quarter of the values nearest to zero."""
    sample = np.sort(np.abs(values.ravel()[:: 1 + values.size // 5000]))  # thousands are enough
    return float(sample[len(sample) // 4]) / 0.3186  # the quartile of a standard normal distribution's magnitude


def find_bounds(mask: Mask) -> Bounds:
    """Return the rows and columns that hold all marks."""
    bounds: Bounds = ndimage.find_objects(mask.astype(np.uint8))[0]
    return bounds


def label_pieces(marks: Mask) -> NDArray[np.int32]:
    """Number the pieces of ink that are connected, also at corners: 0 is no ink."""
    labels: NDArray[np.int32] = ndimage.label(marks, np.ones((3, 3)))[0]
    return labels


def find_pieces(marks: Mask) -> Iterator[tuple[Mask, Bounds]]:
    """Yield each connected piece of ink, cut out, and where it lies."""
    labels = label_pieces(marks)
    for number, bounds in enumerate(ndimage.find_objects(labels), 1):
        yield labels[bounds] == number, bounds


def _widen(bounds: Bounds, coarse: tuple[int, ...], fine: tuple[int, ...]) -> Bounds:
    """Return bounds in a coarse picture as rows and columns of a fine one (shapes given), with a margin."""
    reach = 1 + _MARGIN * max(part.stop - part.start for part in bounds)
    return tuple(
        slice(max(0, int((part.start - reach) * large / small)), math.ceil((part.stop + reach) * large / small))
        for part, small, large in zip(bounds, coarse, fine, strict=True)
    )
