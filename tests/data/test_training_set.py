"""The images that train and those that monitor: nothing is lost, nothing is seen twice."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import DATA, ROOT
from support.additions import NEW, TEST, TRAIN, write_idx

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.data.training_set import find_originals, load_training_data, split


def numbered(count: int) -> Digits:
    """Digits that can be told apart: image i has label i and pixels i (below 256)."""
    labels = torch.arange(count)
    return Digits(labels.to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28), labels)


@pytest.fixture
def copy_of_data(small_data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_data, tmp_path / "raw")


def test_a_split_loses_and_repeats_no_image() -> None:
    training, held_out = split(numbered(200), validation_size=50, seed=0)
    assert (len(training), len(held_out)) == (150, 50)
    assert sorted(training.labels.tolist() + held_out.labels.tolist()) == list(range(200))


def test_a_split_keeps_labels_with_their_images_in_file_order() -> None:
    for part in split(numbered(200), validation_size=50, seed=0):
        assert torch.equal(part.pixels[:, 0, 0], part.labels)
        assert torch.equal(part.labels, part.labels.sort().values)


def test_a_split_depends_on_the_seed_alone() -> None:
    _, held_out = split(numbered(200), validation_size=50, seed=7)
    torch.manual_seed(99)
    _, again = split(numbered(200), validation_size=50, seed=7)
    _, other = split(numbered(200), validation_size=50, seed=8)
    assert torch.equal(held_out.labels, again.labels)
    assert not torch.equal(held_out.labels, other.labels)


def test_the_seeds_are_a_cross_validation() -> None:
    held_out = [split(numbered(200), validation_size=50, seed=seed)[1].labels for seed in range(8)]
    for folds in (held_out[:4], held_out[4:]):  # two orders of the same images
        assert sorted(torch.cat(folds).tolist()) == list(range(200))
    assert not torch.equal(held_out[0], held_out[4])


def test_a_split_leaves_torchs_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    split(numbered(200), validation_size=50, seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_a_split_of_size_0_holds_nothing_out() -> None:
    training, held_out = split(numbered(200), validation_size=0, seed=0)
    assert (len(training), len(held_out)) == (200, 0)


@pytest.mark.parametrize("size", [200, 201, 60_000])
def test_a_split_must_leave_images_to_train_on(size: int) -> None:
    with pytest.raises(UserError, match=rf"^data\.validation_size .* 200 .* {size:,}$"):
        split(numbered(200), validation_size=size, seed=0)


def test_without_a_split_the_test_images_monitor(small_data: Path, params: Params) -> None:
    parts = load_training_data(small_data, small_data / "absent", params.data, seed=0)
    assert {use: len(digits) for use, digits in parts.items()} == {"train": 300, "monitor": 200}
    assert torch.equal(parts["monitor"].pixels, load_digits(small_data, "test").pixels)
    assert params.data.monitor_name == "Test"


def test_with_a_split_the_test_images_are_not_even_read(copy_of_data: Path, params: Params) -> None:
    for file in copy_of_data.glob("t10k-*"):
        file.unlink()
    data = params.data.model_copy(update={"validation_size": 50})
    parts = load_training_data(copy_of_data, copy_of_data / "absent", data, seed=0)
    assert {use: len(digits) for use, digits in parts.items()} == {"train": 250, "monitor": 50}
    assert data.monitor_name == "Validation"


# Copies

ALL = TRAIN + TEST
RANDOM = np.random.default_rng(0)


def encoded(kind: str, quality: int) -> Callable[[np.ndarray], np.ndarray]:
    def encode(pixels: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind, quality=quality)
        return np.asarray(Image.open(buffer).convert("L"))

    return encode


def with_pixels_changed(count: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(pixels: np.ndarray) -> np.ndarray:
        places = RANDOM.choice(pixels.size, count, replace=False)
        np.put(pixels, places, 255 - pixels.ravel()[places])
        return pixels

    return change


def with_noise(amplitude: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: pixels + RANDOM.integers(-amplitude, amplitude + 1, pixels.shape)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "a level of noise": with_noise(1),
    "twenty levels of noise": with_noise(20),
    "a level brighter": lambda pixels: pixels + 1,
    "a level darker": lambda pixels: pixels - 1,
    "thirty levels brighter": lambda pixels: pixels + 30,
    "half the contrast": lambda pixels: pixels / 2,
    "a gamma of 0.7": lambda pixels: 255 * (pixels / 255) ** 0.7,
    "JPEG, quality 95": encoded("JPEG", 95),
    "JPEG, quality 75": encoded("JPEG", 75),
    "WebP, quality 50": encoded("WEBP", 50),
    "a changed pixel": with_pixels_changed(1),
    "five changed pixels": with_pixels_changed(5),
    "a changed pixel, then JPEG": lambda pixels: encoded("JPEG", 75)(with_pixels_changed(1)(pixels)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_copy_of_any_image_is_found(change: Callable[[np.ndarray], np.ndarray]) -> None:
    changed = [np.rint(change(pixels.astype(int))).clip(0, 255).astype(np.uint8) for pixels in ALL.pixels.numpy()]
    assert find_originals(torch.from_numpy(np.stack(changed)), ALL.pixels) == list(range(500))


@pytest.mark.parametrize("dimension", [1, 2])
def test_an_image_that_is_moved_by_a_pixel_is_new(dimension: int) -> None:
    assert set(find_originals(torch.roll(ALL.pixels, 1, dims=dimension), ALL.pixels)) == {None}


def test_copies_of_one_another_are_found_but_the_first() -> None:
    pixels = NEW.pixels[:2].repeat(3, 1, 1)
    assert find_originals(pixels, TEST.pixels) == [None, None, 200, 201, 200, 201]


@pytest.fixture(scope="module")
def mnist() -> torch.Tensor:
    if not (ROOT / "data/raw").is_dir():
        pytest.skip("data/raw is absent: `dvc repro download` makes it")
    return torch.cat([load_digits(ROOT / "data/raw", part).pixels for part in ("train", "test")])


def test_the_most_similar_images_of_mnist_do_not_count_as_copies(mnist: torch.Tensor) -> None:
    pairs = [(58238, 64858), (20465, 24483), (4920, 25434), (27111, 51603), (27111, 63070), (28350, 37674)]
    for first, second in pairs:
        assert find_originals(mnist[[second]], mnist[[first]]) == [None]


@pytest.mark.thorough
def test_no_two_of_mnists_images_count_as_copies(mnist: torch.Tensor) -> None:
    assert len(mnist) == 70_000
    assert set(find_originals(mnist[1:], mnist[:1])) == {None}


# What the stage reads


@pytest.mark.parametrize("validation_size", [0, 50])
def test_without_additions_the_data_are_only_mnists(params: Params, tmp_path: Path, validation_size: int) -> None:
    (tmp_path / ".gitignore").write_text("*")
    data = params.data.model_copy(update={"validation_size": validation_size})
    parts = load_training_data(DATA, tmp_path, data, seed=0)
    expected = split(TRAIN, 50, seed=0) if validation_size else (TRAIN, TEST)
    assert [part.sha256() for part in parts.values()] == [part.sha256() for part in expected]


@pytest.mark.parametrize("validation_size", [0, 50])
def test_additions_train_and_leave_the_monitoring_images_as_they_are(
    params: Params, tmp_path: Path, validation_size: int
) -> None:
    write_idx(tmp_path / "b", NEW[:10])
    write_idx(tmp_path / "a", NEW[10:])
    data = params.data.model_copy(update={"validation_size": validation_size})
    parts = load_training_data(DATA, tmp_path, data, seed=0)
    training, monitor = split(TRAIN, 50, seed=0) if validation_size else (TRAIN, TEST)
    assert parts["monitor"].sha256() == monitor.sha256()
    assert parts["train"].sha256() == (training + NEW[10:] + NEW[:10]).sha256()


@pytest.mark.parametrize(("part", "validation_size"), [("test", 0), ("test", 50), ("train", 0)])
def test_an_addition_with_a_copy_of_an_image_of_mnist_is_refused(
    params: Params, tmp_path: Path, part: str, validation_size: int
) -> None:
    write_idx(tmp_path / "mine", NEW[:3] + {"test": TEST, "train": TRAIN}[part][9:10])
    data = params.data.model_copy(update={"validation_size": validation_size})
    with pytest.raises(UserError, match=rf"mine: image 3 \(a copy of {part} image 9\)$"):
        load_training_data(DATA, tmp_path, data, seed=0)


def test_a_tracked_addition_that_is_absent_is_an_error(params: Params, tmp_path: Path) -> None:
    (tmp_path / "mine.dvc").write_text("outs: []")
    with pytest.raises(UserError, match=r"mine/train-images-idx3-ubyte cannot be read .*dvc pull"):
        load_training_data(DATA, tmp_path, params.data, seed=0)


def test_a_file_that_is_not_an_addition_is_an_error(params: Params, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match="notes/train-images-idx3-ubyte cannot be read"):
        load_training_data(DATA, tmp_path, params.data, seed=0)
