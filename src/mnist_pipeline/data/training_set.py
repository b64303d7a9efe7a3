"""The images that train a network and those that monitor its training: MNIST, added digits, a validation split."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import DataParams
from mnist_pipeline.data.digits import NO_DIGITS, PREFIXES, SIDE, Digits, load_digits, read_part


def read_additions(directory: Path) -> tuple[Digits, list[str]]:
    """Read all additions in a directory, in the order of their names; return the digits and a name for each image.

    Raises:
        UserError: `read_part` refuses an addition, or DVC tracks one that has not been pulled.
    """
    paths = sorted({path.with_suffix("") for path in directory.glob("[!.]*")})  # an addition, its .dvc file, or both
    parts = [read_part(path, "train") for path in paths]
    names = [f"{path}: image {index}" for path, part in zip(paths, parts, strict=True) for index in range(len(part))]
    return sum(parts, NO_DIGITS), names


def check_additions(added: Digits, names: Sequence[str], raw: Path, params: DataParams) -> None:
    """Check added digits against MNIST, which lies in `raw`, and against each other; `names` has a name for each.

    Raises:
        UserError: a digit is a copy of an image of MNIST or of another addition, or is not white on black; or a class
            would have more than `params.max_class_ratio` times the images of another.
    """
    parts = {part: load_digits(raw, part) for part in PREFIXES}
    seen = {
        key: f"MNIST's {part} image {index}"
        for part, digits in parts.items()
        for index, key in enumerate(duplicate_keys(digits))
    }
    copies = []
    for name, key in zip(names, duplicate_keys(added), strict=True):
        if key in seen:
            copies.append(f"{name} (a copy of {seen[key]})")
        seen.setdefault(key, name)
    if copies:
        raise UserError(
            f"added images must be new, not copies of MNIST's or of each other: take out {_first_few(copies)}"
        )
    bright = (added.pixels > 127).sum(dim=(1, 2)).tolist()
    if wrong := [name for name, count in zip(names, bright, strict=True) if not 0 < count < SIDE * SIDE / 2]:
        raise UserError(f"a digit must be white on black, as MNIST's are: take out or invert {_first_few(wrong)}")
    counts = (parts["train"] + added).per_class()
    most, least = counts.index(max(counts)), counts.index(min(counts))
    if counts[most] > params.max_class_ratio * counts[least]:
        raise UserError(
            f"with added digits there are {counts[most]:,} training images of {most} and {counts[least]:,} of {least}: "
            f"data.max_class_ratio allows {params.max_class_ratio:g} times as many"
        )


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def duplicate_keys(digits: Digits) -> list[bytes]:
    """Return a key for each image that near-duplicates share: its pixels in four grey levels.

    Rounding the pixels seldom changes the key, and no two of MNIST's 70,000 images share one.
    """
    return [image.tobytes() for image in (digits.pixels >> 6).numpy()]


def load_additions(directory: Path, raw: Path, params: DataParams) -> Digits:
    """Read the digits that are added to MNIST, and check them; MNIST lies in `raw`.

    Raises:
        UserError: `read_additions` or `check_additions` refuses them.
    """
    added, names = read_additions(directory)
    if names:
        check_additions(added, names, raw, params)
    return added


def split(digits: Digits, validation_size: int, seed: int) -> tuple[Digits, Digits]:
    """Hold out `validation_size` images drawn from `seed`; return the rest and the held-out ones, each in file order.

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
    """Return the images to `train` on and those that `monitor` the training.

    The monitor is a validation split or, if its size is 0, the test images. Added digits are for training only, so they
    do not change the split.
    """
    training, added = load_digits(raw, "train"), load_additions(additions, raw, params)
    if params.validation_size == 0:
        return {"train": training + added, "monitor": load_digits(raw, "test")}
    training, held_out = split(training, params.validation_size, seed)
    return {"train": training + added, "monitor": held_out}
