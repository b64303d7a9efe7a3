"""MNIST, and digits added to it, from IDX files: read, checked, split, and held in memory as tensors."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_pipeline.errors import UserError
from mnist_pipeline.params import DataParams

CLASSES = 10
SIDE = 28  # pixels
PREFIXES = {"train": "train", "test": "t10k"}
# Of MNIST's test images, those whose label a majority of five raters disputes (Northcutt et al., arXiv:2103.14749, data
# at github.com/cleanlab/label-errors): ten got another label, three none, on two the raters were tied.
DISPUTED = [947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729]
TEST_SHA256 = (
    "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b"  # `Digits.sha256` of MNIST's test images
)
FILES = [f"{prefix}-{kind}-ubyte" for prefix in PREFIXES.values() for kind in ("images-idx3", "labels-idx1")]


@dataclass(frozen=True)
class Digits:
    """Labelled images: pixels (N, 28, 28) of 0 to 255 and labels (N,) of 0 to 9."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Digits":
        return Digits(self.pixels[index], self.labels[index])

    def __add__(self, other: "Digits") -> "Digits":
        return Digits(torch.cat([self.pixels, other.pixels]), torch.cat([self.labels, other.labels]))

    def per_class(self) -> list[int]:
        """Count the images of each class."""
        return torch.bincount(self.labels, minlength=CLASSES).tolist()

    def sha256(self) -> str:
        """Return the SHA-256 of the pixels, then the labels, a byte each."""
        content = self.pixels.numpy().tobytes() + self.labels.to(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()

    def likenesses(self) -> list[bytes]:
        """Return by what copies of each image are known: its pixels in four grey levels, which rounding seldom alters.

        No two of MNIST's 70,000 images are alike in it.
        """
        return [image.tobytes() for image in (self.pixels >> 6).numpy()]

    def disputed(self) -> list[int]:
        """Return the places of images whose label is disputed; they are known for MNIST's test images alone."""
        return DISPUTED if self.sha256() == TEST_SHA256 else []

    def tensors(self, params: DataParams, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the network's input (N, 1, 28, 28), pixels scaled to 0..1 and normalised, and the labels (N,)."""
        images = ((self.pixels.float() / 255 - params.mean) / params.std).unsqueeze(1)
        return images.to(device), self.labels.to(device)


NO_DIGITS = Digits(torch.empty(0, SIDE, SIDE, dtype=torch.uint8), torch.empty(0, dtype=torch.long))


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes (format: yann.lecun.com/exdb/mnist, "FILE FORMATS FOR THE MNIST DATABASE").

    The header is two zero bytes, the type (8, unsigned byte), the number of dimensions, and each dimension's size
    as four big-endian bytes; the values follow, last dimension fastest.

    Raises:
        UserError: the file is absent, has another header, or not just the bytes that its header announces.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): `dvc repro download` makes MNIST's, `dvc pull` brings others"
        ) from None
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex(' ') or 'nothing'}"
        )
    start = 4 + 4 * content[3]
    shape = [int(size) for size in np.frombuffer(content[4:start], ">u4")] if len(content) >= start else []
    if not math.prod(shape) or len(content) != start + math.prod(shape):
        raise UserError(f"{path} is damaged: its header announces {shape} values, the file has {len(content):,} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def read_part(directory: Path, part: str) -> Digits:
    """Read the `train` or the `test` part of a directory of IDX files.

    Raises:
        UserError: a file is damaged, or the two do not hold as many 28×28 images as labels of 0 to 9.
    """
    images = directory / f"{PREFIXES[part]}-images-idx3-ubyte"
    labels = directory / f"{PREFIXES[part]}-labels-idx1-ubyte"
    digits = Digits(read_idx(images), read_idx(labels).long())
    if digits.pixels.shape[1:] != (SIDE, SIDE):
        raise UserError(
            f"{images} must hold images of {SIDE}×{SIDE} pixels, and is of shape {tuple(digits.pixels.shape)}"
        )
    if digits.labels.shape != digits.pixels.shape[:1]:
        raise UserError(
            f"{images} holds {len(digits.pixels):,} images, {labels} is of shape {tuple(digits.labels.shape)}"
        )
    if (largest := int(digits.labels.max())) >= CLASSES:
        raise UserError(f"{labels} must hold labels from 0 to {CLASSES - 1}, and holds {largest}")
    return digits


def load_digits(directory: Path, part: str) -> Digits:
    """Read a part of MNIST.

    Raises:
        UserError: `read_part` refuses it, or it lacks a class.
    """
    digits = read_part(directory, part)
    if 0 in (counts := digits.per_class()):
        labels = directory / f"{PREFIXES[part]}-labels-idx1-ubyte"
        raise UserError(f"{labels} must hold labels from 0 to {CLASSES - 1}, some of each: it lacks {counts.index(0)}")
    return digits


def read_additions(directory: Path) -> tuple[Digits, list[str]]:
    """Read what lies in a directory of additions, in the order of their names; and return what each image is called.

    Raises:
        UserError: `read_part` refuses one; or DVC tracks it, and it is not there.
    """
    paths = sorted({path.with_suffix("") for path in directory.glob("[!.]*")})  # an addition, its .dvc file, or both
    parts = [read_part(path, "train") for path in paths]
    names = [f"{path}: image {index}" for path, part in zip(paths, parts, strict=True) for index in range(len(part))]
    return sum(parts, NO_DIGITS), names


def check_additions(added: Digits, names: Sequence[str], raw: Path, params: DataParams) -> None:
    """Check digits, called `names`, that are to train the network together with MNIST's in a directory.

    Raises:
        UserError: one is a copy of an image that MNIST or they themselves hold, or is not white on black; or a class
            would have more than `params.max_class_ratio` times the images of another.
    """
    parts = {part: load_digits(raw, part) for part in PREFIXES}
    seen = {
        likeness: f"MNIST's {part} image {index}"
        for part, digits in parts.items()
        for index, likeness in enumerate(digits.likenesses())
    }
    copies = []
    for name, likeness in zip(names, added.likenesses(), strict=True):
        if likeness in seen:
            copies.append(f"{name} (a copy of {seen[likeness]})")
        seen.setdefault(likeness, name)
    if copies:
        raise UserError(f"no image may train twice, and no test image at all: take out {some(copies)}")
    bright = (added.pixels > 127).sum(dim=(1, 2)).tolist()
    if wrong := [name for name, count in zip(names, bright, strict=True) if not 0 < count < SIDE * SIDE / 2]:
        raise UserError(f"a digit must be white on black, as MNIST's are: take out or invert {some(wrong)}")
    counts = (parts["train"] + added).per_class()
    most, least = counts.index(max(counts)), counts.index(min(counts))
    if counts[most] > params.max_class_ratio * counts[least]:
        raise UserError(
            f"with those added there are {counts[most]:,} training images of {most} and {counts[least]:,} of {least}: "
            f"data.max_class_ratio allows {params.max_class_ratio:g} times as many"
        )


def some(names: Sequence[str]) -> str:
    """Name the first few."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def load_additions(directory: Path, raw: Path, params: DataParams) -> Digits:
    """Read the digits that are added to MNIST's, none where there are none, and check them against those in `raw`.

    Raises:
        UserError: `read_additions` or `check_additions` refuses them.
    """
    added, names = read_additions(directory)
    if names:
        check_additions(added, names, raw, params)
    return added


def split(digits: Digits, validation_size: int, seed: int) -> tuple[Digits, Digits]:
    """Hold out `validation_size` images drawn from `seed`; return the others and them, each in file order.

    Raises:
        UserError: nothing would be left to train on.
    """
    if validation_size >= len(digits):
        raise UserError(
            f"data.validation_size must be under the {len(digits):,} training images, and is {validation_size:,}"
        )
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(len(digits), dtype=torch.bool)
    held_out[order[:validation_size]] = True
    return digits[~held_out], digits[held_out]


def load_training_data(raw: Path, additions: Path, params: DataParams, seed: int) -> dict[str, Digits]:
    """Return the images to `train` on and those that `monitor` it: a validation split, or the test images without.

    Additions only train: the images held out are of MNIST, the same with additions as without.
    """
    training, added = load_digits(raw, "train"), load_additions(additions, raw, params)
    if params.validation_size == 0:
        return {"train": training + added, "monitor": load_digits(raw, "test")}
    training, held_out = split(training, params.validation_size, seed)
    return {"train": training + added, "monitor": held_out}
