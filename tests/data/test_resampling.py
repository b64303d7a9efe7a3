"""Resampling is that of torch's `grid_sample`, and sine and cosine are those of the C library."""

import math

import pytest
import torch
from torch.nn import functional as F

from mnist_pipeline.data.resampling import X, Y, cosine_and_sine, resample


@pytest.mark.parametrize(("padding", "torchs"), [("constant", "zeros"), ("replicate", "border")])
def test_resampling_is_torchs(padding: str, torchs: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 28, 28, generator=generator)
    x, y = X + 20 * torch.randn(5, 1, 1, generator=generator), Y + 3 * torch.randn(5, 28, 28, generator=generator)
    places = torch.stack([x.expand_as(images), y], dim=-1) * (2 / 28)
    expected = F.grid_sample(images.unsqueeze(1), places, padding_mode=torchs, align_corners=False).squeeze(1)
    torch.testing.assert_close(resample(images, x, y, padding), expected, atol=1e-4, rtol=0)


def test_an_image_at_its_own_places_stays_as_it_is() -> None:
    images = torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resample(images, X, Y), images)


def test_cosine_and_sine_keep_the_shape() -> None:
    angles = torch.tensor([[0.0, math.pi / 2], [math.pi, 1.0]])
    cosine, sine = cosine_and_sine(angles)
    torch.testing.assert_close(cosine, angles.cos())
    torch.testing.assert_close(sine, angles.sin())
