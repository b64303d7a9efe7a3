"""Move the pixels of images."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_pipeline.data.digits import SIDE

# Each pixel's distance from the middle of the image, to the right and down, in pixels.
X = (torch.arange(SIDE) - (SIDE - 1) / 2).expand(SIDE, SIDE)
Y = X.T


def resample(images: Tensor, x: Tensor, y: Tensor, padding: str = "zeros") -> Tensor:
    """Take each pixel of images (N, 28, 28) from the place (x, y), in pixels from the middle.

    `x` and `y` are (N, 28, 28) or broadcast to it. Interpolation is bilinear. A place outside the image is black, or
    has the colour of the nearest pixel if the padding is `border`.
    """
    places = torch.stack(torch.broadcast_tensors(x, y), dim=-1).expand(len(images), SIDE, SIDE, 2) * (2 / SIDE)
    return F.grid_sample(images.unsqueeze(1), places, padding_mode=padding, align_corners=False).squeeze(1)


def cosine_and_sine(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of angles in radians, of any shape.

    They are computed one by one, because torch takes those of a whole tensor from MKL (see `common.kernels`).
    """
    found = [[function(angle) for angle in angles.flatten().tolist()] for function in (math.cos, math.sin)]
    cosine, sine = (torch.tensor(values).view_as(angles) for values in found)
    return cosine, sine
