"""The images that train a network and those that monitor its training: MNIST, added digits, a validation split."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import DataParams
from mnist_pipeline.data.digits import DIGITS, NO_DIGITS, PREFIXES, SIDE, Digits, load_digits, read_part

# Of MNIST's own images, no two have a higher correlation than 0.99799, or fewer than 7 pixels that differ by more.
_MAX_CORRELATION = 0.998
_MAX_CHANGED = 6
_SMALL_CHANGE = 40  # of 255 grey levels
_BLOCK = 5000  # images compared at a time, to limit the memory


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
        UserError: a label has no class; a digit is a copy of an image of MNIST or of another addition, or is not white
            on black; or a class would have more than `params.max_class_ratio` times the images of another.
    """
    classes = params.classes
    if wrong := [name for name, label in zip(names, added.labels.tolist(), strict=True) if label >= len(classes)]:
        raise UserError(
            f"a label must be one of 0 to {len(classes) - 1}, as data.classes: take out {_first_few(wrong)}"
        )
    parts = {part: load_digits(raw, part) for part in PREFIXES}
    known = [f"{part} image {index}" for part, digits in parts.items() for index in range(len(digits))]
    known += names
    originals = find_originals(added.pixels, torch.cat([digits.pixels for digits in parts.values()]))
    copies = [
        f"{name} (a copy of {known[original]})"
        for name, original in zip(names, originals, strict=True)
        if original is not None
    ]
    if copies:
        raise UserError(
            f"added images must be new, not copies of those in {raw} or of each other: take out {_first_few(copies)}"
        )
    bright = (added.pixels > 127).sum(dim=(1, 2)).tolist()
    wrong = [name for name, count in zip(names, bright, strict=True) if not 0 < count < SIDE * SIDE / 2]
    if wrong and classes == DIGITS:
        raise UserError(f"a digit must be white on black, as MNIST's are: take out or invert {_first_few(wrong)}")
    counts = (parts["train"] + added).per_class()
    most, least = counts.index(max(counts)), counts.index(min(counts))
    if counts[most] > params.max_class_ratio * counts[least]:
        raise UserError(
            f"with added digits there are {counts[most]:,} training images of {classes[most]} and {counts[least]:,} of "
            f"{classes[least]}: data.max_class_ratio allows {params.max_class_ratio:g} times as many"
        )


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def find_originals(pixels: Tensor, known: Tensor) -> list[int | None]:
    """Find the original of each image (N, 28, 28) that is a copy, among `known` ones (M, 28, 28) and those before it.

    Returns its index, from 0 to M + N - 1, or None for an image that is new. An image is compared with the one that
    correlates most with it, both averaged over 3×3 pixels. It is a copy if that correlation is over _MAX_CORRELATION,
    or if no more than _MAX_CHANGED of its pixels differ by more than _SMALL_CHANGE. This holds for no two of MNIST's
    70,000 images.
    """
    images = torch.cat([known, pixels])
    features = torch.cat([_standardize(part) for part in images.split(_BLOCK)])
    originals: list[int | None] = []
    for own in torch.arange(len(known), len(images)).split(_BLOCK // 10):
        correlations = features[own] @ features.T
        correlations[torch.arange(len(images)) >= own[:, None]] = -1  # only earlier images can be the original
        highest, nearest = correlations.max(dim=1)
        differences = (images[own].short() - images[nearest].short()).abs()
        changed = (differences > _SMALL_CHANGE).sum(dim=(1, 2))
        copied = (highest > _MAX_CORRELATION) | (changed <= _MAX_CHANGED)
        originals += [index if copy else None for index, copy in zip(nearest.tolist(), copied.tolist(), strict=True)]
    return originals


def _standardize(pixels: Tensor) -> Tensor:
    """Average images (N, 28, 28) over 3×3 pixels, in vectors (N, 169) whose products are their correlations."""
    averages = avg_pool2d(pixels.unsqueeze(1).float(), 3, stride=2).flatten(1)
    return normalize(averages - averages.mean(dim=1, keepdim=True))


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
    """Hold out a fold of `validation_size` images; return the rest and the fold, each in file order.

    The images are put in a random order and cut into folds. The seeds 0, 1, 2, … hold out one fold after the other, so
    that they are a cross-validation; when all folds have had their turn, another random order follows.

    Raises:
        UserError: nothing would be left to train on.
    """
    if validation_size >= len(digits):
        raise UserError(
            f"data.validation_size must be under the {len(digits):,} training images, and is {validation_size:,}"
        )
    held_out = torch.zeros(len(digits), dtype=torch.bool)
    if validation_size:
        order, fold = divmod(seed, len(digits) // validation_size)
        images = torch.randperm(len(digits), generator=torch.Generator().manual_seed(order))
        held_out[images.split(validation_size)[fold]] = True
    return digits[~held_out], digits[held_out]


def load_training_data(raw: Path, additions: Path, params: DataParams, seed: int) -> dict[str, Digits]:
    """Return the images to `train` on and those that `monitor` the training.

    The monitor is a validation split or, if its size is 0, the test images. Added digits are for training only, so they
    do not change the split.
    """
    classes = len(params.classes)
    training, added = load_digits(raw, "train", classes), load_additions(additions, raw, params)
    if params.validation_size == 0:
        return {"train": training + added, "monitor": load_digits(raw, "test", classes)}
    training, held_out = split(training, params.validation_size, seed)
    return {"train": training + added, "monitor": held_out}
