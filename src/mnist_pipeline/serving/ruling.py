"""Erase the lines of ruled and squared paper."""

from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

from mnist_pipeline.serving.ink import Array, Mask

_LINE = 0.02  # of the longer side: ruled lines are thinner
_RULED = 0.7  # of a ruled line is seen
_SLOPES = np.linspace(-0.15, 0.15, 61)  # of ruled lines, by which the paper may be turned


def erase_ruling(image: Image.Image) -> Image.Image | None:
    """Return the picture without ruled or squared lines, dark or light; None if there are none."""
    if len(image.getbands()) == 4:
        return None  # a transparent picture has no paper
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    thickness = max(3, round(_LINE * max(image.size)) | 1)
    erased = False
    for axis, sign in product((0, 1), (1, -1)):
        lines = _find_lines(np.moveaxis(sign * pixels.mean(axis=2), axis, 0), thickness, least=1 if erased else 2)
        if lines is not None:
            size = [1, 1, 1]
            size[axis] = thickness + 2
            paper = sign * ndimage.grey_closing(sign * pixels, size)
            pixels = np.where(np.moveaxis(lines, 0, axis)[:, :, None], paper, pixels)
            erased = True
    if not erased:
        return None
    levels = np.rint(pixels).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0])


def _find_lines(grey: Array, thickness: int, least: int) -> Mask | None:
    """Mark dark lines (height, width) that run from left to right; None if there are fewer than `least`.

    What is drawn across a line stays: there the ink is higher than the line is thick.
    """
    depth = ndimage.grey_closing(grey, (thickness, 1)) - grey
    dark = depth > max(6, 3 * float(np.median(depth)))
    height, width = dark.shape
    rows, columns = np.nonzero(dark)
    best, best_seen = 0.0, np.zeros(height)
    for slope in _SLOPES:
        straight = rows + np.rint(slope * (columns - width / 2)).astype(int)
        seen = np.bincount(straight[(straight >= 0) & (straight < height)], minlength=height) / width
        if seen[seen > _RULED].sum() > best_seen[best_seen > _RULED].sum():
            best, best_seen = slope, seen
    if ndimage.label(best_seen > _RULED)[1] < least:
        return None
    ruled = ndimage.binary_dilation(best_seen > _RULED, iterations=2)
    straight = np.arange(height)[:, None] + np.rint(best * (np.arange(width) - width / 2)).astype(int)
    on_line = ruled[straight.clip(0, height - 1)]
    lines: Mask = ndimage.binary_dilation(dark & on_line, np.ones((3, 3)), mask=on_line & (depth > 0))
    return lines
