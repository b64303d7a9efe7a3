"""Training images, each moved a little in another way every time it is seen."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_pipeline.parallel import Group
from mnist_pipeline.params import AugmentationParams


def augment(images: Tensor, params: AugmentationParams, group: Group | None = None) -> Tensor:
    """Turn, scale, shear and shift each image (N, 1, H, W) at random, drawn evenly up to the params either way.

    Between pixels it interpolates bilinearly; from outside comes the border, which in MNIST is background. Of images
    that are a group's share of a batch it draws for all of the batch.
    """
    if not any((params.rotation, params.scale, params.shear, params.shift)):
        return images

    count = group.batch_size if group else len(images)

    def draw(limit: float) -> Tensor:
        return (2 * torch.rand(count) - 1) * limit

    angle, scale, shear = draw(math.radians(params.rotation)), 1 + draw(params.scale), draw(params.shear)
    # Rows of the map from a place in the new image to one in the old; a shift is in halves of the image's side.
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    across, down = (draw(2 * params.shift / side) for side in (images.shape[3], images.shape[2]))
    maps = torch.stack([cosine, shear - sine, across, sine, cosine, down], dim=1).view(-1, 2, 3)
    maps = group.share(maps) if group else maps
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
