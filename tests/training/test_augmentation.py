"""The augmentation: every image moved in its own way, as far as the params say, and the same again from a seed."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnist_pipeline.common.params import AugmentationParams, Params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.training.augmentation import augment

OFF = AugmentationParams(rotation=0.0, shift=0.0, scale=0.0, shear=0.0, clean_epochs=0)


@pytest.fixture
def images(small_data: Path, params: Params) -> Tensor:
    return load_digits(small_data, "test").tensors(params.data, torch.device("cpu"))[0]


def moved(images: Tensor, monkeypatch: pytest.MonkeyPatch, drawn: float, **limits: float) -> Tensor:
    """Augment with every random number from -1 to 1 being the same."""
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, (drawn + 1) / 2))
    return augment(images, OFF.model_copy(update=limits))


def test_without_limits_the_images_stay_as_they_are(images: Tensor) -> None:
    assert augment(images, OFF) is images


def test_a_shift_moves_by_pixels(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = moved(images, monkeypatch, 1, shift=1.0)
    torch.testing.assert_close(found[:, :, :-1, :-1], images[:, :, 1:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("drawn", "turns"), [(1, 1), (-1, -1), (0, 0)])
def test_a_rotation_turns_by_degrees(images: Tensor, monkeypatch: pytest.MonkeyPatch, drawn: float, turns: int) -> None:
    found = moved(images, monkeypatch, drawn, rotation=90.0)
    torch.testing.assert_close(found, images.rot90(turns, (2, 3)), atol=1e-4, rtol=0)


def test_a_scale_is_a_share_of_the_size(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ink = (images - images.min()).sum()
    larger = moved(images, monkeypatch, 1, scale=0.1)
    smaller = moved(images, monkeypatch, -1, scale=0.1)
    assert (larger - images.min()).sum() / ink == pytest.approx(1.1**2, rel=0.02)
    assert (smaller - images.min()).sum() / ink == pytest.approx(0.9**2, rel=0.02)


def test_a_shear_moves_rows_sideways(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = moved(images, monkeypatch, 1, shear=2 / 27)
    torch.testing.assert_close(found[:, :, 0, 1:], images[:, :, 0, :-1], atol=1e-2, rtol=0)
    torch.testing.assert_close(found[:, :, 27, :-1], images[:, :, 27, 1:], atol=1e-2, rtol=0)


def test_each_image_goes_its_own_way(images: Tensor) -> None:
    copies = images[:1].expand(20, -1, -1, -1)
    found = augment(copies, OFF.model_copy(update={"rotation": 10.0, "shift": 2.0, "scale": 0.1, "shear": 0.1}))
    assert len(found.unique(dim=0)) == 20
    assert found.shape == copies.shape


def test_a_seed_gives_the_same_again(images: Tensor) -> None:
    limits = OFF.model_copy(update={"rotation": 10.0, "shift": 2.0})
    torch.manual_seed(3)
    first = augment(images, limits)
    torch.manual_seed(3)
    assert torch.equal(augment(images, limits), first)


def test_nothing_appears_that_is_brighter_or_darker(images: Tensor) -> None:
    found = augment(images, OFF.model_copy(update={"rotation": 180.0, "shift": 14.0, "scale": 0.5, "shear": 0.5}))
    assert found.min() >= images.min() - 1e-5
    assert found.max() <= images.max() + 1e-5
    assert math.isfinite(found.sum().item())
