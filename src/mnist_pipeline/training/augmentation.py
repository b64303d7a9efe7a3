"""Augmentation: small random movements of the training images, new in every epoch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_pipeline.common.params import AugmentationParams


def augment(images: Tensor, params: AugmentationParams) -> Tensor:
    """Rotate, scale, shear and shift each image (N, 1, H, W) at random, by at most `params` in either direction.

    Interpolation between pixels is bilinear. Pixels outside the image repeat its border, which is background in MNIST.
    """
    if not any((params.rotation, params.scale, params.shear, params.shift)):
        return images

    def draw(limit: float) -> Tensor:
        return (2 * torch.rand(len(images)) - 1) * limit

    angle, scale, shear = draw(math.radians(params.rotation)), 1 + draw(params.scale), draw(params.shear)
    # Each map takes a place in the new image to one in the old. The unit of a shift is half the image's side.
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    across, down = (draw(2 * params.shift / side) for side in (images.shape[3], images.shape[2]))
    maps = torch.stack([cosine, shear - sine, across, sine, cosine, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
