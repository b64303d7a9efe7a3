"""Labelled digits to train on besides MNIST's: `mnist add` reads, checks and writes them, and DVC tracks them."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import check_file, write_bytes
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import ADDED, RAW
from mnist_pipeline.data.digits import DIGITS, FILES, SIDE, Digits, read_part
from mnist_pipeline.data.training_set import check_additions, read_additions
from mnist_pipeline.serving.kept import UNLABELLED, directory_of
from mnist_pipeline.serving.picture_file import MAX_BYTES, name_in_errors, open_image
from mnist_pipeline.serving.preprocessing import simplify_image, to_network_image

_IMAGES, _LABELS = FILES[:2]  # an addition's files have the names of MNIST's training files


def add_digits(source: Path, name: str, normalize: bool) -> None:
    """Check the digits in a directory, write all of them to `data/added/<name>` and have DVC track them.

    Raises:
        UserError: the name is taken or not allowed, a digit cannot be read or is refused, or DVC fails.
    """
    addition = ADDED / name
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{name!r} cannot name an addition: choose a --name of letters, digits, _ and -")
    if addition.exists() or addition.with_suffix(".dvc").exists():
        raise UserError(f"{addition} exists: choose another --name, or first run `dvc remove --outs {addition}.dvc`")
    params = load_params().data
    digits, names = read_labelled_digits(source, normalize, params.classes)
    earlier, earlier_names = read_additions(ADDED)
    check_additions(earlier + digits, earlier_names + names, RAW, params)
    with tempfile.TemporaryDirectory(dir=ADDED.parent, prefix=".add-") as temporary:
        written = Path(temporary) / name
        write_bytes(written / _IMAGES, encode_idx(digits.pixels))
        write_bytes(written / _LABELS, encode_idx(digits.labels))
        written.rename(addition)
    counts = digits.per_class(len(params.classes))
    print(
        f"{addition}: {len(digits):,} images; by class, {params.classes[0]} to {params.classes[-1]}: {counts}",
        flush=True,
    )
    if subprocess.run(["dvc", "add", "--quiet", str(addition)], check=False).returncode != 0:
        raise UserError(f"DVC does not track {addition} (its error is above): fix that, then run `dvc add {addition}`")
    print(f"Commit {addition}.dvc; `make repro` trains on them")


def read_labelled_digits(source: Path, normalize: bool, classes: Sequence[str] = DIGITS) -> tuple[Digits, list[str]]:
    """Read IDX files, or pictures in directories named as the classes; return the digits and a name for each image.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    if (source / _IMAGES).exists():
        digits = read_part(source, "train")
        return digits, [f"{source / _IMAGES}: image {index}" for index in range(len(digits))]
    labels = {directory_of(name): label for label, name in enumerate(classes)}
    directories = sorted(path for path in source.glob("[!.]*") if path.name != UNLABELLED)
    wanted = "directories 0 to 9" if classes == DIGITS else f"directories named {', '.join(labels)}"
    if unknown := [path for path in directories if path.name not in labels]:
        raise UserError(f"{unknown[0]} is unknown: {source} must hold {wanted} with pictures, or {_IMAGES}")
    pictures = [path for directory in directories for path in sorted(directory.glob("[!.]*"))]
    if not pictures:
        raise UserError(f"{source} has no pictures in {wanted}, and no {_IMAGES}")
    progress = tqdm(pictures, desc="Reading", unit="picture", delay=2, leave=False, disable=None)
    pixels = np.stack([_read_picture(path, normalize, classes) for path in progress])
    found = torch.tensor([labels[path.parent.name] for path in pictures])
    return Digits(torch.from_numpy(pixels), found), list(map(str, pictures))


def _read_picture(path: Path, normalize: bool, classes: Sequence[str]) -> NDArray[np.uint8]:
    """Return the pixels (28, 28) of a grey picture of this size as they are; normalise any other picture."""
    with name_in_errors(path):
        check_file(path, MAX_BYTES)
        picture = open_image(path.read_bytes())
        simple = simplify_image(picture)
        if (simple.mode, simple.size) == ("L", (SIDE, SIDE)):
            return np.asarray(simple)
        if not normalize:
            raise UserError(
                f"the picture must have {SIDE}×{SIDE} grey pixels, but has {picture.width}×{picture.height} "
                f"(mode {picture.mode}): --normalize brings any picture to the training images' form"
            )
        return to_network_image(picture, classes)


def encode_idx(values: Tensor) -> bytes:
    """Return values of 0 to 255 as the content of an IDX file."""
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4) for size in values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()
