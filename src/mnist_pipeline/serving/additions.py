"""Labelled digits that train besides MNIST's: read, checked, written as IDX files and tracked (`mnist add`)."""

import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import write_bytes
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import ADDED, RAW
from mnist_pipeline.data.digits import CLASSES, FILES, SIDE, Digits, read_part
from mnist_pipeline.data.training_set import check_additions, read_additions
from mnist_pipeline.serving import preprocessing

IMAGES, LABELS = FILES[:2]  # of an addition, as of MNIST's training images


def add(source: Path, name: str, normalize: bool) -> None:
    """Bring the digits of a directory to `data/added`, all or none, as the addition of a name that DVC tracks.

    Raises:
        UserError: the name is taken or cannot be one, the digits cannot be read or must not train, or DVC fails.
    """
    addition = ADDED / name
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{name!r} must be of letters, digits, _ and - to name an addition: choose a --name")
    if addition.exists() or addition.with_suffix(".dvc").exists():
        raise UserError(f"{addition} is there: choose another --name, or `dvc remove --outs {addition}.dvc` before")
    digits, names = read_source(source, normalize)
    before, names_before = read_additions(ADDED)
    check_additions(before + digits, names_before + names, RAW, load_params().data)
    with tempfile.TemporaryDirectory(dir=ADDED.parent, prefix=".add-") as temporary:
        written = Path(temporary) / name
        write_bytes(written / IMAGES, encode_idx(digits.pixels))
        write_bytes(written / LABELS, encode_idx(digits.labels))
        written.rename(addition)
    print(f"{addition}: {len(digits):,} images; of each class from 0 to 9: {digits.per_class()}", flush=True)
    if subprocess.run(["dvc", "add", "--quiet", str(addition)], check=False).returncode != 0:
        raise UserError(f"{addition} is not tracked, as DVC says above: mend that, then `dvc add {addition}`")
    print(f"Commit {addition}.dvc; `make repro` trains on them")


def read_source(source: Path, normalize: bool) -> tuple[Digits, list[str]]:
    """Read labelled digits, IDX files or pictures in directories 0 to 9, and return what each image is called.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if (source / IMAGES).exists():
        digits = read_part(source, "train")
        return digits, [f"{source / IMAGES}: image {index}" for index in range(len(digits))]
    classes = sorted(source.glob("[!.]*"))
    if unknown := [path for path in classes if path.name not in map(str, range(CLASSES))]:
        raise UserError(
            f"{unknown[0]} is unknown: in {source}, pictures lie in directories 0 to 9, or there is {IMAGES}"
        )
    pictures = [path for directory in classes for path in sorted(directory.glob("[!.]*"))]
    if not pictures:
        raise UserError(f"{source} holds no pictures in directories 0 to 9, nor {IMAGES}")
    reading = tqdm(pictures, desc="Reading", unit="picture", delay=2, leave=False, disable=None)
    pixels = np.stack([read_picture(path, normalize) for path in reading])
    labels = torch.tensor([int(path.parent.name) for path in pictures])
    return Digits(torch.from_numpy(pixels), labels), list(map(str, pictures))


def read_picture(path: Path, normalize: bool) -> NDArray[np.uint8]:
    """Return the pixels (28, 28) of a grey picture of this size as they are, those of others as `normalize` makes them.

    Raises:
        UserError: it is no picture, or another and not to be normalised.
    """
    picture = preprocessing.open_image(path)
    simple = preprocessing.simplify(picture)
    if (simple.mode, simple.size) == ("L", (SIDE, SIDE)):
        return np.asarray(simple)
    if not normalize:
        raise UserError(
            f"{path} must be of {SIDE}×{SIDE} grey pixels, and is of {picture.width}×{picture.height} "
            f"(mode {picture.mode}): --normalize brings any picture of a digit to MNIST's form"
        )
    try:
        return preprocessing.normalize(picture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def encode_idx(values: Tensor) -> bytes:
    """Return values of 0 to 255 as the IDX file that `read_idx` reads."""
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4) for size in values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()
