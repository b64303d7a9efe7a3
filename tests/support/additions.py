"""New digits to add to MNIST's, as pictures or IDX files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mnist_pipeline.data.digits import FILES, Digits, load_digits
from mnist_pipeline.serving.additions import encode_idx
from support import DATA

IMAGES, LABELS = FILES[:2]
TRAIN, TEST = (load_digits(DATA, part) for part in ("train", "test"))
# Real digits, moved by a pixel so that they are not copies, of the classes that are rare in the small MNIST.
RARE = torch.isin(TRAIN.labels, torch.tensor([0, 3, 6, 8]))
NEW = Digits(torch.roll(TRAIN.pixels, 1, dims=2), TRAIN.labels)[RARE][:40]


def write_picture(path: Path, pixels: object, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).convert(mode).save(path)


def write_pictures(directory: Path, digits: Digits) -> Path:
    for index, (pixels, label) in enumerate(zip(digits.pixels, digits.labels.tolist(), strict=True)):
        write_picture(directory / str(label) / f"{index:03}.png", pixels)
    return directory


def write_idx(directory: Path, digits: Digits) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / IMAGES).write_bytes(encode_idx(digits.pixels))
    (directory / LABELS).write_bytes(encode_idx(digits.labels))
    return directory
