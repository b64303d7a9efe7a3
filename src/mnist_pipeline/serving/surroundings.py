"""Find the one digit of a picture among what surrounds it: frames, ruled paper, shadows, edges and neighbours."""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.serving.frames import find_frames, is_empty_frame, look_inside
from mnist_pipeline.serving.ink import (
    Array,
    Bounds,
    Ink,
    Mask,
    corners_are_bright,
    find_bounds,
    find_pieces,
    label_pieces,
    measure_ink,
    measure_local_ink,
)
from mnist_pipeline.serving.ruling import erase_ruling

_CROPS = 3  # a picture may be cropped so often
_MARGIN = 0.25  # of a digit's longer side: so much paper stays around it
_BROAD = 0.3  # of the shorter side: strokes are narrower, shadows broader
_WHOLE = 2.0  # times the shorter side: the whole picture
_STRONG = 60  # of 255 levels: a digit that leaves no margin differs so much from its background
_STRAIGHT = 0.9  # of the pixels agree that the ink ends at a straight line: a shadow's
_OUTER = 0.2  # of each side: the picture's rim
_MOSTLY = 0.75  # of a piece at the edge lies in the rim, if it is no digit
_TALL, _WIDE = 0.18, 0.25  # of the height, of the longer side: a digit clear of the edge is at least so large
_PART_OF_DIGIT = 0.1  # of the largest piece: smaller ones are dust
_REMAINS = 1 / 3  # of the strongest ink: what is paler after lines were erased, or inside a frame, is no digit
_BROADEST = 0.6  # of a digit's longer side: a stroke (MNIST's: 0.5), but not a lamp's light, a finger or a sheet
_THINNEST = 0.08  # of a digit's longer side: a stroke, but not a printed frame
# Pieces with so much of the strongest ink, of the tallest one's height, and so far apart, are digits of their own.
_AS_DARK, _AS_TALL, _APART = 0.5, 0.6, 0.1


def find_digit(image: Image.Image) -> Array:
    """Return the ink (height, width) of the part of a simplified picture that holds its digit.

    If no ink touches the picture's edge and none is a frame, all of it is the digit. Otherwise what may surround a
    digit is taken away: a frame, ruled lines, a shadow, what lies at the edge. Where nothing helps, all ink counts.

    Raises:
        UserError: there is no digit, or more than one.
    """
    ink, kept = _search(image, _CROPS)
    if _broadest_stroke(ink, kept) > _BROADEST:
        raise UserError("the picture holds no digit: what stands out from its background has no strokes")
    if _are_several(ink, kept):
        raise UserError("the picture holds more than one digit: cut out one")
    return ink.cut_out(kept)


def _broadest_stroke(ink: Ink, marks: Mask) -> float:
    """Return the breadth of the broadest stroke, as a part of the marks' longer side."""
    strong = marks & (ink.coarse > ink.coarse[marks].max() / 3)
    breadth = 2 * float(ndimage.distance_transform_edt(np.pad(strong, 1)).max())
    return breadth / int(max(part.stop - part.start for part in find_bounds(strong)))


def _are_several(ink: Ink, kept: Mask) -> bool:
    """Tell whether the kept marks are digits beside or below each other."""
    strongest = ink.coarse[kept].max()
    strong = [bounds for piece, bounds in find_pieces(kept) if ink.coarse[bounds][piece].max() >= _AS_DARK * strongest]
    tallest = max(rows.stop - rows.start for rows, _ in strong)
    tall = [bounds for bounds in strong if bounds[0].stop - bounds[0].start >= _AS_TALL * tallest]
    axes = (1,) if _touches_edge(ink.mark()) else (0, 1)  # a 1 without a margin can fall into pieces below each other
    extents = [sorted((bounds[axis].start, bounds[axis].stop) for bounds in tall) for axis in axes]
    return any(after[0] - before[1] > _APART * tallest for each in extents for before, after in pairwise(each))


def _search(image: Image.Image, crops: int, lines: bool = True) -> tuple[Ink, Mask]:
    """Return the ink of a picture, or of a part of it, and which marks are the digit's.

    `crops` says how often it may still be cropped, `lines` whether lines may be erased.
    """
    ink = measure_ink(image)
    marks = ink.mark()
    frames = find_frames(marks) if ink.visible and crops else []
    if ink.visible and not frames and not _touches_edge(marks):
        return ink, marks
    if inside := _search_inside(image, frames, ink, crops, lines):
        return inside
    if lines and (unruled := erase_ruling(image)):
        found, kept = _search(unruled, crops, lines=False)
        remains = _touches_edge(kept) and not _find_inner(kept).any() and not _fills(kept)
        if remains or found.coarse.max() < _REMAINS * ink.coarse.max():
            raise _no_digit()
        return found, kept
    if frames and is_empty_frame(marks, frames[0]) and _broadest_stroke(ink, marks) < _THINNEST:
        raise _no_digit()
    if not ink.visible or _is_broad(marks):
        if past := _look_past_shadows(image, ink, marks):
            return past
        if not ink.visible or _is_shadow(marks):
            raise _no_digit()
    inner = _find_inner(marks)
    if not (inner.any() and _lie_outside(marks)):
        return ink, marks
    if not crops:
        return ink, inner
    return _search(_crop(image, find_bounds(inner), marks.shape), crops - 1, lines=False)


def _search_inside(
    image: Image.Image, frames: list[Mask], outside: Ink, crops: int, lines: bool
) -> tuple[Ink, Mask] | None:
    """Return what the first frame holds that has a digit clear of its edge."""
    for frame in frames:
        try:
            ink, kept = _search(look_inside(image, frame), crops - 1, lines)
        except UserError:
            continue
        if not _touches_edge(kept) and ink.coarse.max() >= _REMAINS * outside.coarse.max():
            return ink, kept
    return None


def _look_past_shadows(image: Image.Image, smooth: Ink, marks: Mask) -> tuple[Ink, Mask] | None:
    """Return ink that stands out from what is near, or a digit so large that no smooth background could be fitted."""
    bright = corners_are_bright(image)
    for dark in (True, False) if _is_shadow(marks) else (bright,):  # most shadows fall on paper
        ink = measure_local_ink(image, smooth, _BROAD, dark)
        inner = _find_inner(ink.mark())
        if ink.visible and inner.sum() > ink.mark().sum() / 2:
            return ink, inner
    if not smooth.visible:
        ink = measure_local_ink(image, smooth, _WHOLE, bright)
        marks = ink.mark()
        if ink.coarse.max() >= _STRONG and _fills(marks) and not _is_shadow(marks):
            return ink, marks
    return None


def _no_digit() -> UserError:
    return UserError("the picture holds no digit: nothing in it stands out from its background")


def _crop(image: Image.Image, bounds: Bounds, coarse: tuple[int, ...]) -> Image.Image:
    """Cut out bounds of the coarse picture (shape given) with a margin."""
    reach = 1 + _MARGIN * max(part.stop - part.start for part in bounds)
    (top, bottom), (left, right) = (
        (max(0.0, part.start - reach) * fine / size, min(size, part.stop + reach) * fine / size)
        for part, fine, size in zip(bounds, (image.height, image.width), coarse, strict=True)
    )
    return image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))


def _touches_edge(marks: Mask) -> bool:
    return bool(marks[[0, -1]].any() or marks[:, [0, -1]].any())


def _is_broad(marks: Mask) -> bool:
    """Tell whether a square of ink is too broad for a stroke."""
    side = max(3, round(_BROAD * min(marks.shape)))
    return bool(ndimage.binary_erosion(marks, np.ones((side, side))).any())


def _is_shadow(marks: Mask) -> bool:
    """Tell whether the marks are all on one side of a straight line."""
    y, x = (axis.ravel() for axis in np.indices(marks.shape))
    terms = np.stack([np.ones(marks.size), y, x], axis=1)
    side = terms @ np.linalg.lstsq(terms, marks.ravel().astype(float))[0] > 0.5
    return bool((side == marks.ravel()).mean() > _STRAIGHT)


def _fills(marks: Mask) -> bool:
    """Tell whether a piece covers the middle of the picture and half of its height or width."""
    return any(
        all(part.start < size / 2 < part.stop for part, size in zip(bounds, marks.shape, strict=True))
        and any(part.stop - part.start > size / 2 for part, size in zip(bounds, marks.shape, strict=True))
        for _, bounds in find_pieces(marks)
    )


def _find_inner(marks: Mask) -> Mask:
    """Keep the pieces clear of the edge: those large enough for a digit, and what has a tenth of their size."""
    labels = label_pieces(marks)
    sizes = np.bincount(labels.ravel())
    sizes[_find_outer(labels)] = 0
    large = [
        size
        for size, (rows, columns) in zip(sizes[1:], ndimage.find_objects(labels), strict=True)
        if rows.stop - rows.start >= _TALL * marks.shape[0]
        or max(rows.stop - rows.start, columns.stop - columns.start) >= _WIDE * max(marks.shape)
    ]
    kept: Mask = (sizes > 0) & (sizes >= _PART_OF_DIGIT * max(large, default=math.inf))
    return kept[labels]


def _find_outer(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the numbers of the pieces at the edge, and 0."""
    return np.union1d([0], np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def _lie_outside(marks: Mask) -> bool:
    """Tell whether the pieces that touch the edge stay near it."""
    labels = label_pieces(marks)
    y, x = (np.minimum(at, at[::-1]) / len(at) for at in map(np.arange, marks.shape))
    near = np.minimum.outer(y, x) < _OUTER
    return bool((ndimage.mean(near, labels, _find_outer(labels)[1:]) > _MOSTLY).all())
