"""A suite of corruptions: each makes images harder to read in its own way, and a person still reads nearly all.

It follows MNIST-C (Mu and Gilmer, arXiv:1906.02337). The functions take images (N, 28, 28) of 0..1, bright on dark,
and a generator to draw from, which draws for one image after another, so that an image becomes the same whatever
follows it. How strong a corruption is stands in its default argument.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from mnist_pipeline.data.digits import SIDE, Digits

BATCH_SIZE = 1000  # images; bounds memory

Function = Callable[[Tensor, Generator], Tensor]

# The place of each pixel, from the middle of the image to the right and down.
X = (torch.arange(SIDE) - (SIDE - 1) / 2).expand(SIDE, SIDE)
Y = X.T


@dataclass(frozen=True)
class Corruption:
    """A corruption by its name, and whether it is `geometric`, moving what is drawn, or `non-geometric`."""

    name: str
    family: str
    function: Function

    def apply(self, digits: Digits) -> Digits:
        """Return corrupted digits with the same labels, the same at each call.

        The seed is the name's, so no other corruption has a part in it.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        batches = [self.function(pixels / 255, generator) for pixels in digits.pixels.split(BATCH_SIZE)]
        pixels = torch.cat([(255 * batch.clamp(0, 1)).round().to(torch.uint8) for batch in batches])
        return Digits(pixels, digits.labels)


def uniform(images: Tensor, generator: Generator, *shape: int) -> Tensor:
    """Draw numbers of 0..1 for each image (N, *shape)."""
    return torch.rand(len(images), *shape, generator=generator)


def either_way(images: Tensor, generator: Generator, *shape: int) -> Tensor:
    """Draw -1 or 1 for each image (N, *shape), ready to stand before its pixels."""
    return uniform(images, generator, *shape, 1, 1).round() * 2 - 1


def sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return images whose pixels come from the places (x, y) of others, in pixels from the middle.

    Between pixels it interpolates bilinearly; what comes from outside is black.
    """
    places = torch.stack(torch.broadcast_tensors(x, y), dim=-1).expand(len(images), SIDE, SIDE, 2) * (2 / SIDE)
    return F.grid_sample(images.unsqueeze(1), places, align_corners=False).squeeze(1)


def smooth(images: Tensor, sigma: float) -> Tensor:
    """Convolve images (N, 28, 28) with a Gaussian of a standard deviation in pixels."""
    distances = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    weights = torch.exp(-(distances**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    across = F.conv2d(images.unsqueeze(1), weights, padding="same")
    return F.conv2d(across, weights.mT, padding="same").squeeze(1)


def rotate(images: Tensor, generator: Generator, degrees: float = 25) -> Tensor:
    """Turn each image either way."""
    angle = either_way(images, generator) * math.radians(degrees)
    return sample(images, X * angle.cos() - Y * angle.sin(), X * angle.sin() + Y * angle.cos())


def translate(images: Tensor, generator: Generator, pixels: float = 2) -> Tensor:
    """Move each image left or right, and up or down."""
    across, down = either_way(images, generator, 2).unbind(1)
    return sample(images, X + pixels * across, Y + pixels * down)


def shrink(images: Tensor, generator: Generator, factor: float = 0.65) -> Tensor:
    """Make each digit smaller."""
    return sample(images, X / factor, Y / factor)


def shear(images: Tensor, generator: Generator, slope: float = 0.7) -> Tensor:
    """Slant each image either way, by `slope` pixels sideways a pixel down."""
    return sample(images, X + slope * either_way(images, generator) * Y, Y)


def tilt(images: Tensor, generator: Generator, strength: float = 0.5) -> Tensor:
    """Show each image in perspective: its left or its right side goes back and gets smaller."""
    nearness = (1 + strength * either_way(images, generator) * X / (SIDE / 2)) / (1 + strength)
    return sample(images, X / nearness, Y / nearness)


def deform(images: Tensor, generator: Generator, pixels: float = 1.5, sigma: float = 3) -> Tensor:
    """Move each pixel its own way, its neighbours much the same (elastic deformation).

    `pixels` is the standard deviation of a move either way, `sigma` how far neighbours share it. Source: Simard,
    Steinkraus and Platt, Best Practices for Convolutional Neural Networks (2003).
    """
    noise = torch.randn(len(images), 2, SIDE, SIDE, generator=generator)
    moves = smooth(noise.flatten(0, 1), sigma).view_as(noise) * (pixels * 2 * sigma * math.sqrt(math.pi))
    return sample(images, X + moves[:, 0], Y + moves[:, 1])


def add_gaussian_noise(images: Tensor, generator: Generator, deviation: float = 0.15) -> Tensor:
    """Add normal noise to each pixel."""
    return images + deviation * torch.randn(images.shape, generator=generator)


def add_impulse_noise(images: Tensor, generator: Generator, share: float = 0.06) -> Tensor:
    """Make a share of the pixels black or white."""
    drawn = uniform(images, generator, SIDE, SIDE)
    return images.masked_fill(drawn < share, 0).masked_fill(drawn < share / 2, 1)


def blur(images: Tensor, generator: Generator, sigma: float = 1.25) -> Tensor:
    """Blur each image, as a lens out of focus does."""
    return smooth(images, sigma)


def blur_by_motion(images: Tensor, generator: Generator, pixels: int = 5) -> Tensor:
    """Blur each image along a line of so many pixels, in a direction of its own."""
    angle = math.pi * uniform(images, generator, 1, 1)
    steps = range(-(pixels // 2), pixels // 2 + 1)
    return torch.stack([sample(images, X + step * angle.cos(), Y + step * angle.sin()) for step in steps]).mean(0)


def lower_contrast(images: Tensor, generator: Generator, factor: float = 0.4) -> Tensor:
    """Bring each image's pixels closer to their mean."""
    mean = images.mean(dim=(1, 2), keepdim=True)
    return mean + factor * (images - mean)


def add_fog(images: Tensor, generator: Generator, density: float = 0.25) -> Tensor:
    """Lay light over each image, in clouds."""
    clouds = F.interpolate(uniform(images, generator, 1, 6, 6), SIDE, mode="bicubic").squeeze(1).clamp(0, 1)
    return images + density * clouds * (1 - images)


def add_stripe(images: Tensor, generator: Generator, pixels: float = 2) -> Tensor:
    """Invert a vertical stripe somewhere in the middle half of each image."""
    middle = (uniform(images, generator, 1, 1) - 0.5) * SIDE / 2
    return torch.where((X - middle).abs() < pixels / 2, 1 - images, images)


def occlude(images: Tensor, generator: Generator, pixels: float = 6) -> Tensor:
    """Lay a black square over each image, its middle somewhere in the middle third."""
    across, down = ((uniform(images, generator, 2, 1, 1) - 0.5) * SIDE / 3).unbind(1)
    hidden = ((X - across).abs() < pixels / 2) & ((Y - down).abs() < pixels / 2)
    return images.masked_fill(hidden, 0)


def add_dotted_line(images: Tensor, generator: Generator, width: float = 2) -> Tensor:
    """Draw a straight dotted line across each image, near the middle."""
    angle, offset = uniform(images, generator, 2, 1, 1).unbind(1)
    angle, offset = math.pi * angle, (offset - 0.5) * SIDE / 2
    along, aside = X * angle.cos() + Y * angle.sin(), Y * angle.cos() - X * angle.sin()
    dots = ((aside - offset).abs() < width / 2) & (along % (2 * width) < width)
    return images.masked_fill(dots, 1)


def thicken(images: Tensor, generator: Generator, pixels: int = 4) -> Tensor:
    """Let each pixel become the brightest of a square around it (dilation)."""
    around = F.pad(images, ((pixels - 1) // 2, pixels // 2) * 2, mode="replicate")
    return F.max_pool2d(around, pixels, stride=1)


GEOMETRIC: Mapping[str, Function] = {
    "rotation": rotate,
    "translation": translate,
    "shrinking": shrink,
    "shear": shear,
    "perspective": tilt,
    "elastic deformation": deform,
}
NON_GEOMETRIC: Mapping[str, Function] = {
    "Gaussian noise": add_gaussian_noise,
    "impulse noise": add_impulse_noise,
    "blur": blur,
    "motion blur": blur_by_motion,
    "low contrast": lower_contrast,
    "fog": add_fog,
    "stripe": add_stripe,
    "occlusion": occlude,
    "dotted line": add_dotted_line,
    "thick strokes": thicken,
}
CORRUPTIONS = [
    Corruption(name, family, function)
    for family, functions in {"geometric": GEOMETRIC, "non-geometric": NON_GEOMETRIC}.items()
    for name, function in functions.items()
]
