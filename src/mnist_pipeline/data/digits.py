"""Labelled images of digits, read from IDX files and held in memory as tensors."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import check_file
from mnist_pipeline.common.params import Normalization

DIGITS = list("0123456789")  # the names of the classes, if nothing else is said
SIDE = 28  # pixels
_MAX_IMAGES = 1_000_000  # in a file: EMNIST's largest has 697,932
_MAX_HEADER = 4 + 4 * 255  # bytes
MAX_IDX_BYTES = _MAX_HEADER + _MAX_IMAGES * SIDE * SIDE
PREFIXES = {"train": "train", "test": "t10k"}
FILES = [f"{prefix}-{kind}-ubyte" for prefix in PREFIXES.values() for kind in ("images-idx3", "labels-idx1")]

_MNIST = {  # `Digits.sha256` of MNIST's own parts
    "train": "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
    "test": "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
}


@dataclass(frozen=True)
class Digits:
    """Labelled images: pixels (N, 28, 28) of 0 to 255 and labels (N,) from 0 on."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Digits":
        return Digits(self.pixels[index], self.labels[index])

    def __add__(self, other: "Digits") -> "Digits":
        return Digits(torch.cat([self.pixels, other.pixels]), torch.cat([self.labels, other.labels]))

    def per_class(self, classes: int = 0) -> list[int]:
        """Count the images of each class that has any, and of `classes` classes at least."""
        return torch.bincount(self.labels, minlength=classes).tolist()

    def is_mnist(self, part: str) -> bool:
        """Return whether these are exactly the `train` or the `test` images of MNIST."""
        return self.sha256() == _MNIST[part]

    def sha256(self) -> str:
        """Return the SHA-256 of the pixels, then the labels, a byte each."""
        content = self.pixels.numpy().tobytes() + self.labels.to(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()

    def tensors(self, normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the network's input (N, 1, 28, 28), pixels scaled to 0..1 and normalised, and the labels (N,)."""
        images = self.pixels.float().div_(255).sub_(normalization.mean).div_(normalization.std).unsqueeze(1)
        return images.to(device), self.labels.to(device)


NO_DIGITS = Digits(torch.empty(0, SIDE, SIDE, dtype=torch.uint8), torch.empty(0, dtype=torch.long))


def _read_idx(path: Path, max_bytes: int) -> Tensor:
    """Read an IDX file of unsigned bytes (format: yann.lecun.com/exdb/mnist, "FILE FORMATS FOR THE MNIST DATABASE").

    The header holds two zero bytes, the type (8 for unsigned bytes), the number of dimensions, and the size of each as
    four big-endian bytes. The values follow; the last dimension varies fastest.
    """
    try:
        check_file(path, max_bytes)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): `dvc repro download` fetches MNIST, `dvc pull` added digits"
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
        UserError: a file is absent or damaged, or the files do not hold one label for each 28×28 image.
    """
    images = directory / f"{PREFIXES[part]}-images-idx3-ubyte"
    labels = directory / f"{PREFIXES[part]}-labels-idx1-ubyte"
    digits = Digits(_read_idx(images, MAX_IDX_BYTES), _read_idx(labels, _MAX_HEADER + _MAX_IMAGES).long())
    if digits.pixels.shape[1:] != (SIDE, SIDE):
        raise UserError(
            f"{images} must hold images of {SIDE}×{SIDE} pixels, and has shape {tuple(digits.pixels.shape)}"
        )
    if digits.labels.shape != digits.pixels.shape[:1]:
        raise UserError(
            f"{images} holds {len(digits.pixels):,} images, {labels} has shape {tuple(digits.labels.shape)}"
        )
    return digits


def load_digits(directory: Path, part: str, classes: int | None = None) -> Digits:
    """Read a part of the data.

    Raises:
        UserError: `read_part` refuses it, or the labels are not 0, 1, 2, … without a gap, up to `classes` of them.
    """
    digits = read_part(directory, part)
    counts = digits.per_class(classes or 0)
    wanted, found = classes or len(counts), f"lacks {counts.index(0)}" if 0 in counts else f"holds {len(counts) - 1}"
    if 0 in counts or len(counts) > wanted:
        labels = directory / f"{PREFIXES[part]}-labels-idx1-ubyte"
        raise UserError(
            f"{labels} must hold each label from 0 to {wanted - 1}, and {found}: data.classes in params.yaml names all"
        )
    return digits
