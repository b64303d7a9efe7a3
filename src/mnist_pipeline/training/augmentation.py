"""Training images, each moved a little in another way every time it is seen."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_pipeline.common.params import AugmentationParams


def augment(images: Tensor, params: AugmentationParams) -> Tensor:
    """Rotate, scale, shear and shift each image (N, 1, H, W) at random, by up to the params in either direction.

    Values between pixels are interpolated bilinearly. What comes from outside the image repeats its border, which in
    MNIST is background.
    """
    if not any((params.rotation, params.scale, params.shear, params.shift)):
        return images

    def draw(limit: float) -> Tensor:
        return (2 * torch.rand(len(images)) - 1) * limit

    angle, scale, shear = draw(math.radians(params.rotation)), 1 + draw(params.scale), draw(params.shear)
    # Each map leads from a place in the new image to one in the old; a shift is in halves of the image's side.
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    across, down = (draw(2 * params.shift / side) for side in (images.shape[3], images.shape[2]))
    maps = torch.stack([cosine, shear - sine, across, sine, cosine, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
