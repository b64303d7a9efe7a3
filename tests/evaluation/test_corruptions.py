"""The corruptions: each does what its name says to every image, and does the same each time."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.evaluation import corruptions
from mnist_pipeline.evaluation.corruptions import CORRUPTIONS, Corruption

each_corruption = pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)


@pytest.fixture
def digits(small_data: Path) -> Digits:
    return load_digits(small_data, "test")


@pytest.fixture
def generator() -> Generator:
    return torch.Generator().manual_seed(0)


def dots(*places: tuple[int, int]) -> Tensor:
    """Return twenty black images (20, 28, 28) with white pixels at these rows and columns."""
    images = torch.zeros(20, 28, 28)
    for row, column in places:
        images[:, row, column] = 1
    return images


def lit(images: Tensor) -> set[tuple[tuple[int, ...], ...]]:
    """Return the rows and columns of the bright pixels of each image."""
    return {tuple(map(tuple, (image > 0.5).nonzero().tolist())) for image in images}


@each_corruption
def test_every_image_is_changed_and_stays_an_image(corruption: Corruption, digits: Digits) -> None:
    found = corruption.apply(digits)
    assert found.pixels.dtype == torch.uint8
    assert found.pixels.shape == digits.pixels.shape
    assert torch.equal(found.labels, digits.labels)
    changed = (found.pixels != digits.pixels).flatten(1).any(1)
    assert changed.float().mean() > 0.95  # a square may hide what was black before
    assert found.pixels.float().std() > 10


@each_corruption
def test_it_does_not_depend_on_other_random_numbers(corruption: Corruption, digits: Digits) -> None:
    first = corruption.apply(digits)
    torch.manual_seed(3)
    for other in CORRUPTIONS:
        other.apply(digits[:7])
    assert torch.equal(corruption.apply(digits).pixels, first.pixels)


@each_corruption
def test_an_image_does_not_depend_on_those_that_follow_it(corruption: Corruption, digits: Digits) -> None:
    assert torch.equal(corruption.apply(digits[:5]).pixels, corruption.apply(digits).pixels[:5])


@each_corruption
def test_a_corruption_does_not_depend_on_the_batch_size(
    corruption: Corruption, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = corruption.apply(digits)
    monkeypatch.setattr(corruptions, "BATCH_SIZE", 80)
    assert torch.equal(corruption.apply(digits).pixels, whole.pixels)


def test_corruptions_differ_in_name_and_seed() -> None:
    assert len({zlib.crc32(corruption.name.encode()) for corruption in CORRUPTIONS}) == len(CORRUPTIONS) == 16
    assert [corruption.family for corruption in CORRUPTIONS] == ["geometric"] * 6 + ["non-geometric"] * 10


@pytest.mark.parametrize(
    "function",
    [corruptions.rotate, corruptions.shear, corruptions.tilt, corruptions.shrink, corruptions.deform],
)
def test_a_corruption_that_moves_pixels_leaves_a_grey_image_grey(
    function: Callable[[Tensor, Generator], Tensor], generator: Generator
) -> None:
    found = function(torch.full((4, 28, 28), 0.5), generator)
    torch.testing.assert_close(found[:, 12:16, 12:16], torch.full((4, 4, 4), 0.5))


def test_a_translation_moves_each_image_by_whole_pixels_to_one_of_four_corners(generator: Generator) -> None:
    found = corruptions.translate(dots((10, 15)), generator, pixels=3)
    assert lit(found) == {((7, 12),), ((7, 18),), ((13, 12),), ((13, 18),)}
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(20), atol=1e-4, rtol=0)


def test_a_translation_brings_black_from_outside(generator: Generator) -> None:
    found = corruptions.translate(torch.ones(20, 28, 28), generator, pixels=2)
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.full((20,), 26.0 * 26.0), atol=0.1, rtol=0)


def test_a_rotation_turns_each_image_one_way_or_the_other(generator: Generator) -> None:
    found = corruptions.rotate(dots((4, 13), (4, 14)), generator, degrees=90)
    assert lit(found) == {((13, 4), (14, 4)), ((13, 23), (14, 23))}


def test_shrinking_brings_the_sides_of_a_square_closer(generator: Generator) -> None:
    square = torch.zeros(1, 28, 28)
    square[:, 4:24, 4:24] = 1
    [found] = corruptions.shrink(square, generator, factor=0.5) > 0.5
    assert found[9:19, 9:19].all()
    assert found.sum() == 100


def test_a_shear_moves_rows_sideways_by_their_distance_from_the_middle(generator: Generator) -> None:
    column = torch.zeros(20, 28, 28)
    column[:, :, 13:15] = 1
    found = corruptions.shear(column, generator, slope=2 / 3)
    assert lit(found[:, 12:13]) == {((0, 14), (0, 15)), ((0, 12), (0, 13))}  # 1.5 rows up: by one column
    assert lit(found[:, 21:22]) == {((0, 8), (0, 9)), ((0, 18), (0, 19))}  # 7.5 rows down: by five


def test_perspective_leaves_one_side_its_height_and_makes_the_other_smaller(generator: Generator) -> None:
    band = torch.zeros(20, 28, 28)
    band[:, 4:24] = 1
    heights = (corruptions.tilt(band, generator, strength=0.5) > 0.5).sum(dim=1)
    near, far = heights.amax(dim=1), heights[:, 7:21].amin(dim=1)
    assert (near == 20).all()
    assert (far < 14).all()
    assert {int(row[0] > row[27]) for row in heights} == {0, 1}


def test_a_deformation_moves_neighbours_alike_and_by_its_deviation(generator: Generator) -> None:
    ramp = (torch.arange(28) / 27).expand(2000, 28, 28)
    moves = 27 * (corruptions.deform(ramp, generator, pixels=1.0, sigma=3) - ramp)[:, 9:19, 9:19]
    assert moves.std() == pytest.approx(1, rel=0.05)
    assert (moves[:, :, 1:] - moves[:, :, :-1]).std() < 0.3


def test_gaussian_noise_has_its_deviation(generator: Generator) -> None:
    noise = corruptions.add_gaussian_noise(torch.full((50, 28, 28), 0.5), generator, deviation=0.1) - 0.5
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 0.1), abs=0.002)


def test_impulse_noise_makes_its_share_of_pixels_black_or_white(generator: Generator) -> None:
    found = corruptions.add_impulse_noise(torch.full((50, 28, 28), 0.5), generator, share=0.2)
    shares = [(found == value).float().mean().item() for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.1, 0.8, 0.1], abs=0.01)


def test_a_blur_spreads_a_dot_as_a_gaussian_does(generator: Generator) -> None:
    [found] = corruptions.blur(dots((14, 14))[:1], generator, sigma=1.5)
    assert found.sum() == pytest.approx(1, abs=1e-4)
    assert found[14, 17] / found[14, 14] == pytest.approx(torch.e ** (-(3**2) / (2 * 1.5**2)), rel=1e-3)
    torch.testing.assert_close(found, found.T)


def test_motion_spreads_a_dot_along_a_line(generator: Generator) -> None:
    found = corruptions.blur_by_motion(dots((14, 14)), generator, pixels=5)
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(20), atol=0.25, rtol=0)
    for image in found:
        places = image.nonzero().float()
        assert (places - 14).norm(dim=1).max() < 3.5  # two pixels from the dot, and what interpolation adds
    assert len(found.unique(dim=0)) == 20  # each in its own direction


def test_low_contrast_keeps_the_mean(generator: Generator) -> None:
    found = corruptions.lower_contrast(dots((3, 4)), generator, factor=0.25)
    assert found.mean() == pytest.approx(1 / 784)
    assert found.amax() - found.amin() == pytest.approx(0.25)


def test_fog_makes_nothing_darker_and_leaves_white_as_it_is(generator: Generator) -> None:
    found = corruptions.add_fog(dots((3, 4)), generator, density=0.5)
    assert (found[:, 3, 4] == 1).all()
    assert (found.min().item(), found[:, 5:].max().item()) == pytest.approx((0, 0.5), abs=0.05)


def test_a_stripe_is_inverted(generator: Generator) -> None:
    found = corruptions.add_stripe(torch.ones(20, 28, 28), generator, pixels=2)
    assert {int(image.sum()) for image in found} == {26 * 28}
    assert (found == found[:, :1]).all()
    assert len(found.unique(dim=0)) > 5


def test_an_occlusion_is_a_black_square(generator: Generator) -> None:
    hidden = corruptions.occlude(torch.ones(50, 28, 28), generator, pixels=7) == 0
    assert {int(image.sum()) for image in hidden} == {49}
    assert {int(image.any(dim=side).sum()) for image in hidden for side in (0, 1)} == {7}
    assert len(hidden.unique(dim=0)) > 25


def test_a_dotted_line_is_white_and_straight(generator: Generator) -> None:
    drawn = corruptions.add_dotted_line(torch.zeros(50, 28, 28), generator, width=2)
    assert drawn.unique().tolist() == [0, 1]
    for image in drawn:
        places = image.nonzero().float()
        length, width = torch.linalg.svdvals(places - places.mean(dim=0)) / len(places) ** 0.5
        assert length > 5
        assert width < 0.8


def test_thick_strokes_grow_to_all_sides(generator: Generator) -> None:
    [image] = corruptions.thicken(dots((10, 20))[:1], generator, pixels=3)
    assert {tuple(place) for place in image.nonzero().tolist()} == {(r, c) for r in (9, 10, 11) for c in (19, 20, 21)}
