"""Only MNIST's test images have disputed labels."""

from pathlib import Path

import pytest
from support import ROOT

from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.evaluation.disputed import DISPUTED, disputed_images


@pytest.fixture(scope="module")
def mnist() -> Digits:
    """MNIST's own test images, if the pipeline has fetched them."""
    raw = ROOT / "data/raw"
    if not raw.is_dir():
        pytest.skip("data/raw is absent: `dvc repro download` makes it")
    return load_digits(raw, "test")


def test_the_disputed_labels_of_mnists_test_images_are_known(mnist: Digits) -> None:
    assert disputed_images(mnist) == DISPUTED == sorted(set(DISPUTED))
    assert mnist.labels[DISPUTED].tolist() == [8, 0, 9, 4, 2, 5, 6, 6, 5, 5, 0, 1, 4, 6, 5]


def test_a_part_of_them_has_no_disputed_labels(mnist: Digits) -> None:
    assert disputed_images(mnist[:9_999]) == []


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_images_have_no_disputed_labels(small_data: Path, part: str) -> None:
    assert disputed_images(load_digits(small_data, part)) == []
