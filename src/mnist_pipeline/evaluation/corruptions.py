"""Sixteen ways to make images harder to read; people still read nearly all of them.

They follow MNIST-C (Mu and Gilmer, arXiv:1906.02337). Each function takes images (N, 28, 28) of 0..1, bright on dark,
and a generator of random numbers; its default arguments set the strength. It draws the numbers image by image, so the
images that follow an image do not change its corruption.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from mnist_pipeline.data.digits import SIDE, Digits
from mnist_pipeline.data.resampling import X, Y, cosine_and_sine, resample

BATCH_SIZE = 250  # images; what a step needs then fits into the cache


@dataclass(frozen=True)
class Corruption:
    """A corruption. Its family is `geometric` if it moves the strokes, else `non-geometric`."""

    name: str
    family: str
    function: Callable[[Tensor, Generator], Tensor]

    def apply(self, digits: Digits) -> Digits:
        """Corrupt digits and keep their labels. The seed comes from the name, so every call gives the same images."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        batches = [self.function(pixels / 255, generator) for pixels in digits.pixels.split(BATCH_SIZE)]
        pixels = torch.cat([(255 * batch.clamp(0, 1)).round().to(torch.uint8) for batch in batches])
        return Digits(pixels, digits.labels)


def _draw_uniform(images: Tensor, generator: Generator, *shape: int) -> Tensor:
    """Draw numbers of 0..1, (N, *shape)."""
    return torch.rand(len(images), *shape, generator=generator)


def _draw_signs(images: Tensor, generator: Generator, *shape: int) -> Tensor:
    """Draw -1 or 1, (N, *shape, 1, 1): the last two axes broadcast over an image's pixels."""
    return _draw_uniform(images, generator, *shape, 1, 1).round() * 2 - 1


def _smooth(images: Tensor, sigma: float) -> Tensor:
    """Convolve images (N, 28, 28) with a Gaussian whose standard deviation is `sigma` pixels."""
    reach = math.ceil(3 * sigma)
    weights = torch.tensor([math.exp(-(distance**2) / (2 * sigma**2)) for distance in range(-reach, reach + 1)])
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    across = F.conv2d(images.unsqueeze(1), weights, padding="same")
    return F.conv2d(across, weights.mT, padding="same").squeeze(1)


def rotate(images: Tensor, generator: Generator, degrees: float = 25) -> Tensor:
    """Turn each image clockwise or anticlockwise."""
    cosine, sine = cosine_and_sine(_draw_signs(images, generator) * math.radians(degrees))
    return resample(images, X * cosine - Y * sine, X * sine + Y * cosine)


def translate(images: Tensor, generator: Generator, pixels: float = 2) -> Tensor:
    """Move each image left or right, and up or down."""
    across, down = _draw_signs(images, generator, 2).unbind(1)
    return resample(images, X + pixels * across, Y + pixels * down)


def shrink(images: Tensor, generator: Generator, factor: float = 0.65) -> Tensor:
    """Make each digit smaller."""
    return resample(images, X / factor, Y / factor)


def shear(images: Tensor, generator: Generator, slope: float = 0.7) -> Tensor:
    """Slant each image to the left or the right, by `slope` pixels for each pixel down."""
    return resample(images, X + slope * _draw_signs(images, generator) * Y, Y)


def tilt(images: Tensor, generator: Generator, strength: float = 0.5) -> Tensor:
    """Show each image in perspective: its left or right side is farther away and looks smaller."""
    nearness = (1 + strength * _draw_signs(images, generator) * X / (SIDE / 2)) / (1 + strength)
    return resample(images, X / nearness, Y / nearness)


def deform(images: Tensor, generator: Generator, pixels: float = 1.5, sigma: float = 3) -> Tensor:
    """Move each pixel at random, and neighbours nearly together (elastic deformation).

    `pixels` is the standard deviation of the moves along each axis, `sigma` how far neighbours share them. Source:
    Simard, Steinkraus and Platt, Best Practices for Convolutional Neural Networks (2003).
    """
    noise = torch.randn(len(images), 2, SIDE, SIDE, generator=generator)
    moves = _smooth(noise.flatten(0, 1), sigma).view_as(noise) * (pixels * 2 * sigma * math.sqrt(math.pi))
    return resample(images, X + moves[:, 0], Y + moves[:, 1])


def add_gaussian_noise(images: Tensor, generator: Generator, deviation: float = 0.15) -> Tensor:
    """Add normal noise to each pixel."""
    return images + deviation * torch.randn(images.shape, generator=generator)


def add_impulse_noise(images: Tensor, generator: Generator, share: float = 0.06) -> Tensor:
    """Make a share of the pixels black or white, half and half."""
    drawn = _draw_uniform(images, generator, SIDE, SIDE)
    return images.masked_fill(drawn < share, 0).masked_fill(drawn < share / 2, 1)


def blur(images: Tensor, generator: Generator, sigma: float = 1.25) -> Tensor:
    """Blur each image, as a lens out of focus does."""
    return _smooth(images, sigma)


def blur_by_motion(images: Tensor, generator: Generator, pixels: int = 5) -> Tensor:
    """Blur each image along a line of `pixels`, in a random direction."""
    cosine, sine = cosine_and_sine(math.pi * _draw_uniform(images, generator, 1, 1))
    steps = range(-(pixels // 2), pixels // 2 + 1)
    return torch.stack([resample(images, X + step * cosine, Y + step * sine) for step in steps]).mean(0)


def lower_contrast(images: Tensor, generator: Generator, factor: float = 0.4) -> Tensor:
    """Bring each image's pixels closer to their mean."""
    mean = images.mean(dim=(1, 2), keepdim=True)
    return mean + factor * (images - mean)


def add_fog(images: Tensor, generator: Generator, density: float = 0.25) -> Tensor:
    """Brighten each image in clouds."""
    clouds = F.interpolate(_draw_uniform(images, generator, 1, 6, 6), SIDE, mode="bicubic").squeeze(1).clamp(0, 1)
    return images + density * clouds * (1 - images)


def add_stripe(images: Tensor, generator: Generator, pixels: float = 2) -> Tensor:
    """Invert a vertical stripe somewhere in the middle half of each image."""
    middle = (_draw_uniform(images, generator, 1, 1) - 0.5) * SIDE / 2
    return torch.where((X - middle).abs() < pixels / 2, 1 - images, images)


def occlude(images: Tensor, generator: Generator, pixels: float = 6) -> Tensor:
    """Hide a square of each image in black; its centre is somewhere in the middle third."""
    across, down = ((_draw_uniform(images, generator, 2, 1, 1) - 0.5) * SIDE / 3).unbind(1)
    hidden = ((X - across).abs() < pixels / 2) & ((Y - down).abs() < pixels / 2)
    return images.masked_fill(hidden, 0)


def add_dotted_line(images: Tensor, generator: Generator, width: float = 2) -> Tensor:
    """Draw a straight dotted line across each image, near the middle."""
    angle, offset = _draw_uniform(images, generator, 2, 1, 1).unbind(1)
    (cosine, sine), offset = cosine_and_sine(math.pi * angle), (offset - 0.5) * SIDE / 2
    along, aside = X * cosine + Y * sine, Y * cosine - X * sine
    dots = ((aside - offset).abs() < width / 2) & (along % (2 * width) < width)
    return images.masked_fill(dots, 1)


def thicken(images: Tensor, generator: Generator, pixels: int = 4) -> Tensor:
    """Give each pixel the brightest value of the square around it (dilation)."""
    around = F.pad(images, ((pixels - 1) // 2, pixels // 2) * 2, mode="replicate")
    return F.max_pool2d(around, pixels, stride=1)


CORRUPTIONS = [
    Corruption("rotation", "geometric", rotate),
    Corruption("translation", "geometric", translate),
    Corruption("shrinking", "geometric", shrink),
    Corruption("shear", "geometric", shear),
    Corruption("perspective", "geometric", tilt),
    Corruption("elastic deformation", "geometric", deform),
    Corruption("Gaussian noise", "non-geometric", add_gaussian_noise),
    Corruption("impulse noise", "non-geometric", add_impulse_noise),
    Corruption("blur", "non-geometric", blur),
    Corruption("motion blur", "non-geometric", blur_by_motion),
    Corruption("low contrast", "non-geometric", lower_contrast),
    Corruption("fog", "non-geometric", add_fog),
    Corruption("stripe", "non-geometric", add_stripe),
    Corruption("occlusion", "non-geometric", occlude),
    Corruption("dotted line", "non-geometric", add_dotted_line),
    Corruption("thick strokes", "non-geometric", thicken),
]
