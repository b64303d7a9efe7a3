"""Move the pixels of images, by arithmetic whose last bits are the same everywhere (see `common.kernels`)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_pipeline.data.digits import SIDE

# Each pixel's distance from the middle of the image, to the right and down, in pixels.
X = (torch.arange(SIDE) - (SIDE - 1) / 2).expand(SIDE, SIDE)
Y = X.T


def resample(images: Tensor, x: Tensor, y: Tensor, padding: str = "constant") -> Tensor:
    """Take each pixel of images (N, 28, 28) from the place (x, y), in pixels from the middle.

    `x` and `y` are (N, 28, 28) or broadcast to it. Interpolation is bilinear. A place outside the image is black, or
    has the colour of the nearest pixel if the padding is `replicate`.
    """
    width = SIDE + 2  # of the padded image
    padded = F.pad(images.unsqueeze(1), (1, 1, 1, 1), padding).flatten(1)
    column, row = (place.expand_as(images).flatten(1).add((width - 1) / 2).clamp(0, width - 1) for place in (x, y))
    left, top = (place.floor().clamp(max=width - 2) for place in (column, row))
    corner = (width * top + left).long()
    upper, lower = (
        torch.lerp(padded.gather(1, corner + down), padded.gather(1, corner + down + 1), column - left)
        for down in (0, width)
    )
    return torch.lerp(upper, lower, row - top).view_as(images)


def cosine_and_sine(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of angles in radians, of any shape.

    They are computed one by one, because torch takes those of a whole tensor from MKL.
    """
    found = [[function(angle) for angle in angles.flatten().tolist()] for function in (math.cos, math.sin)]
    cosine, sine = (torch.tensor(values).view_as(angles) for values in found)
    return cosine, sine
