"""Find the frames in a picture: sheets, photos, axes, boxes and circles of forms."""

import numpy as np
from PIL import Image
from scipy import ndimage

from mnist_pipeline.serving.ink import Mask, find_bounds, find_pieces

_MOST_FRAMES = 3  # the largest ones are looked into
_SMALLEST_FRAME = 10  # pixels of the coarse picture
_RECTANGULAR = 0.88  # of a rectangle is filled by a sheet that perspective distorts
_INSET = 0.03  # of a frame's longer side: its own border and the fringes of a JPEG
_HELD = 0.25  # of a frame's longer side: what is enclosed may be a digit


def find_frames(marks: Mask) -> list[Mask]:
    """Mark the insides of frames: a sheet on a table, a photo on a page, axes, a box or circle of a form.

    A frame is a rectangle, or paper within a piece that encloses what may be a digit. Those that enclose something come
    first, and of these the largest.
    """
    found = []
    for piece, bounds in find_pieces(marks):
        filled = ndimage.binary_fill_holes(piece)
        whole = (slice(None), slice(None))
        for region, place in [(filled, whole), *find_pieces(filled & ~piece)]:
            if min(region.shape) < _SMALLEST_FRAME:
                continue
            frame = np.zeros_like(marks)
            frame[bounds][place] = ndimage.binary_erosion(region, iterations=1 + round(_INSET * max(region.shape)))
            held = find_bounds(marks & frame) if (marks & frame).any() else ()
            encloses = any(part.stop - part.start >= _HELD * max(region.shape) for part in held)
            if frame.any() and (_is_rectangle(region) or (encloses and place is not whole)):
                found.append((encloses, int(frame.sum()), frame))
    return [frame for *_, frame in sorted(found, key=lambda each: each[:2], reverse=True)[:_MOST_FRAMES]]


def is_empty_frame(marks: Mask, frame: Mask) -> bool:
    """Tell whether nothing but a frame is marked, and nothing in it."""
    border = ndimage.binary_dilation(frame, iterations=4 + round(3 * _INSET * max(marks.shape))) & ~frame
    return not (marks & ~border).any()


def _is_rectangle(piece: Mask) -> bool:
    """Tell whether a piece fills most of a rectangle, turned or not."""
    y, x = np.nonzero(piece & ~ndimage.binary_erosion(piece))
    turns = np.linspace(0, np.pi / 2, 31)[:, None]
    sides = (
        np.ptp(x * np.cos(turns) + y * np.sin(turns), axis=1),
        np.ptp(y * np.cos(turns) - x * np.sin(turns), axis=1),
    )
    return bool(piece.sum() > _RECTANGULAR * ((sides[0] + 1) * (sides[1] + 1)).min())


def look_inside(image: Image.Image, frame: Mask) -> Image.Image:
    """Cut out what is inside a frame of the coarse picture; a pixel outside becomes as the nearest one inside."""
    inside = np.asarray(Image.fromarray(frame).resize(image.size))
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    rows, columns = find_bounds(inside)
    return Image.fromarray(np.asarray(image)[tuple(nearest)][rows, columns])
