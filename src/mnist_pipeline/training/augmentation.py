"""Augmentation: small random movements of the training images, new in every epoch."""

import math

import torch
from torch import Tensor

from mnist_pipeline.common.params import AugmentationParams
from mnist_pipeline.data.resampling import X, Y, cosine_and_sine, resample


def augment(images: Tensor, params: AugmentationParams) -> Tensor:
    """Rotate, scale, shear and shift each image (N, 1, 28, 28) at random, by at most `params` in either direction.

    Interpolation between pixels is bilinear. Pixels outside the image repeat its border, which is background in MNIST.
    """
    if not any((params.rotation, params.scale, params.shear, params.shift)):
        return images

    def draw(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), 1, 1) - 1) * limit

    cosine, sine = cosine_and_sine(draw(math.radians(params.rotation)))
    scale, shear = 1 + draw(params.scale), draw(params.shear)
    across, down = draw(params.shift), draw(params.shift)
    # Each pixel of the new image comes from this place in the old one.
    x = (cosine * X - sine * Y) / scale + shear * Y + across
    y = (sine * X + cosine * Y) / scale + down
    return resample(images.squeeze(1), x.to(images), y.to(images), padding="replicate").unsqueeze(1)
