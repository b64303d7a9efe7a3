"""The data: what is read is what the files say, and a damaged file is refused in one line that names it."""

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import FILES, Digits, load_digits
from mnist_pipeline.data.download import mismatches, read_digests

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def numbered(count: int) -> Digits:
    """Digits that can be told apart: image i is of label i and of pixels i (below 256)."""
    labels = torch.arange(count)
    return Digits(labels.to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28), labels)


def header(*sizes: int) -> bytes:
    return bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4) for size in sizes)


def relabelled(old: int, new: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:8] + content[8:].replace(bytes([old]), bytes([new]))


DAMAGES = {
    "truncated images": (IMAGES, lambda content: content[:-1], "damaged"),
    "truncated labels": (LABELS, lambda content: content[:-1], "damaged"),
    "half of the images": (IMAGES, lambda content: content[: len(content) // 2], "damaged"),
    "extra bytes after images": (IMAGES, lambda content: content + b"\0\0", "damaged"),
    "extra byte after labels": (LABELS, lambda content: content + b"\0", "damaged"),
    "wrong magic": (IMAGES, lambda content: b"\1" + content[1:], "starts with 01 00 08 03"),
    "IDX of floats": (IMAGES, lambda content: b"\0\0\x0d" + content[3:], "starts with 00 00 0d 03"),
    "still gzipped": (IMAGES, gzip.compress, "starts with 1f 8b 08"),
    "a web page": (LABELS, lambda content: b"<!DOCTYPE html>\n<html></html>\n", "starts with 3c 21 44 4f"),
    "empty images": (IMAGES, lambda content: b"", "starts with nothing"),
    "empty labels": (LABELS, lambda content: b"", "starts with nothing"),
    "three bytes": (IMAGES, lambda content: content[:3], "starts with 00 00 08"),
    "half a header": (IMAGES, lambda content: content[:10], "damaged"),
    "header only": (IMAGES, lambda content: content[:16], "damaged"),
    "no images": (IMAGES, lambda content: header(0, 28, 28), "damaged"),
    "no labels": (LABELS, lambda content: header(0), "damaged"),
    "images of no width": (IMAGES, lambda content: header(300, 28, 0), "damaged"),
    "more than memory holds": (IMAGES, lambda content: header(2**32 - 1, 2**32 - 1, 2**32 - 1), "damaged"),
    "a single value": (IMAGES, lambda content: header() + b"\7", "28×28"),
    "255 dimensions": (IMAGES, lambda content: header(*255 * [1]) + b"\7", "28×28"),
    "labels for images": (IMAGES, lambda content: header(300) + bytes(300), "28×28"),
    "flat images": (IMAGES, lambda content: header(300, 784) + content[16:], "28×28"),
    "images of another size": (IMAGES, lambda content: header(300, 14, 56) + content[16:], "28×28"),
    "images of three colours": (IMAGES, lambda content: header(100, 28, 28, 3) + content[16:], "28×28"),
    "an image too few": (IMAGES, lambda content: header(299, 28, 28) + content[16:-784], "299 images"),
    "a label too few": (LABELS, lambda content: header(299) + content[8:-1], "(299,)"),
    "labels in a table": (LABELS, lambda content: header(300, 1) + content[8:], "(300, 1)"),
    "a single label": (LABELS, lambda content: header() + b"\7", "()"),
    "label 10": (LABELS, relabelled(9, 10), "from 0 to 9"),
    "label 255": (LABELS, relabelled(9, 255), "from 0 to 9"),
    "no nines": (LABELS, relabelled(9, 4), "from 0 to 9"),
    "no zeros": (LABELS, relabelled(0, 1), "from 0 to 9"),
    "damaged test images": ("t10k-images-idx3-ubyte", lambda content: content[:-1], "damaged"),
    "damaged test labels": ("t10k-labels-idx1-ubyte", lambda content: content[:-1], "damaged"),
}


@pytest.fixture
def copy_of_data(small_data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_data, tmp_path / "raw")


@pytest.mark.parametrize(
    ("part", "labels"),
    [("train", [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]), ("test", [4, 7, 1, 2, 4, 0, 2, 7, 4, 3])],
)
def test_digits_are_those_of_the_files(small_data: Path, part: str, labels: list[int]) -> None:
    digits = load_digits(small_data, part)
    assert len(digits) == {"train": 300, "test": 200}[part]
    assert digits.pixels.shape == (len(digits), 28, 28)
    assert digits.labels[:10].tolist() == labels
    assert (digits.pixels.min(), digits.pixels.max()) == (0, 255)


def test_an_image_is_read_row_by_row(small_data: Path) -> None:
    seven = load_digits(small_data, "train").pixels[0]
    assert seven[7, 6:12].tolist() == [84, 185, 159, 151, 60, 36]  # the left end of its bar
    assert seven[26, 10:14].tolist() == [121, 254, 207, 18]  # its foot


def test_images_are_counted_by_class() -> None:
    digits = Digits(torch.zeros(5, 28, 28, dtype=torch.uint8), torch.tensor([3, 0, 3, 9, 3]))
    assert digits.per_class() == [1, 0, 0, 3, 0, 0, 0, 0, 0, 1]


def test_the_digest_of_digits_is_that_of_their_bytes_in_the_files(small_data: Path) -> None:
    images, labels = ((small_data / name).read_bytes() for name in (IMAGES, LABELS))
    expected = hashlib.sha256(images[16:] + labels[8:]).hexdigest()
    assert load_digits(small_data, "train").sha256() == expected


@pytest.mark.parametrize(
    "change", [lambda digits: digits[:-1], lambda digits: Digits(digits.pixels, digits.labels + 1)]
)
def test_other_digits_have_another_digest(change: Callable[[Digits], Digits]) -> None:
    assert change(numbered(20)).sha256() != numbered(20).sha256()


def test_pixels_are_scaled_and_normalised(params: Params) -> None:
    pixels = torch.zeros(2, 28, 28, dtype=torch.uint8)
    pixels[1, 0, 27], pixels[1, 27, 0] = 255, 51  # white and a fifth of it
    images, labels = Digits(pixels, torch.tensor([4, 2])).tensors(params.data, torch.device("cpu"))
    assert images.shape == (2, 1, 28, 28)
    assert images[0].unique().tolist() == pytest.approx([(0 - 0.1307) / 0.3081])
    assert images[1, 0, 0, 27].item() == pytest.approx((1 - 0.1307) / 0.3081)
    assert images[1, 0, 27, 0].item() == pytest.approx((0.2 - 0.1307) / 0.3081)
    assert labels.tolist() == [4, 2]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_refused_in_one_line(
    copy_of_data: Path, name: str, damage: Callable[[bytes], bytes], reason: str
) -> None:
    file = copy_of_data / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError) as refused:
        load_digits(copy_of_data, "train" if name.startswith("train") else "test", classes=10)
    message = str(refused.value)
    assert str(file) in message
    assert reason in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_an_absent_file_is_named_with_what_makes_it(copy_of_data: Path, name: str) -> None:
    (copy_of_data / name).unlink()
    with pytest.raises(UserError, match=rf"{name} .*dvc repro download"):
        load_digits(copy_of_data, "train")


@pytest.mark.parametrize("name", FILES)
def test_one_altered_byte_is_found_by_its_digest(small_data: Path, copy_of_data: Path, name: str) -> None:
    digests = read_digests(small_data / "SHA256SUMS")
    assert not mismatches(copy_of_data, digests)
    content = bytearray((copy_of_data / name).read_bytes())
    content[-1] ^= 1
    (copy_of_data / name).write_bytes(content)
    assert list(mismatches(copy_of_data, digests)) == [name]
