"""A trained network that reads one digit at a time."""

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, cast

import click
import numpy as np
import torch
from numpy.typing import NDArray

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import check_file
from mnist_pipeline.common.paths import BEST, MODEL
from mnist_pipeline.data.digits import SIDE
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.serving.picture_file import MAX_BYTES, name_in_errors, open_image
from mnist_pipeline.serving.preprocessing import to_network_image


@dataclass(frozen=True)
class Prediction:
    """A digit or other class, its probability, the probability of each class in order, and the class's name."""

    digit: int
    probability: float
    probabilities: list[float]
    name: str


class Classifier:
    """The network of a model file, loaded once, on one thread of the CPU.

    Raises:
        UserError: the file is absent, damaged, or of another network.
    """

    def __init__(self, path: Path) -> None:
        self.model = load_model(path)
        torch.set_num_threads(1)  # more threads would only wait for one another over a single image

    def classify(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Read an image (28, 28), 0 to 255, such as a digit in white on black."""
        mean, std = self.model.normalization.mean, self.model.normalization.std
        images = ((torch.tensor(pixels, dtype=torch.float32) / 255 - mean) / std).view(1, 1, SIDE, SIDE)
        with torch.inference_mode():
            probabilities = self.model.network(images)[0].double().softmax(dim=0).tolist()  # doubles sum to 1
        digit = max(range(len(probabilities)), key=probabilities.__getitem__)
        return Prediction(digit, probabilities[digit], probabilities, self.model.classes[digit])

    def read(self, picture: BinaryIO | bytes) -> tuple[Prediction, NDArray[np.uint8]]:
        """Read a picture of any size; return also the pixels (28, 28) that the network got."""
        pixels = to_network_image(open_image(picture), self.model.classes)
        return self.classify(pixels), pixels


@contextmanager
def find_model(path: Path | None) -> Generator[tuple[Path, str]]:
    """Return the model file to answer with, and what it is called.

    Without a path it is the registry's champion, or else the train stage's model, or else the published *best*.
    """
    with TemporaryDirectory() as directory:
        if path is None:
            from mnist_pipeline.tracking.registry import fetch_champion

            path = MODEL if MODEL.exists() or not BEST.exists() else BEST
            path, source = fetch_champion(Path(directory)) or (path, str(path))
        else:
            source = str(path)
        yield path, source


def classify_files(files: Sequence[str], classifier: Classifier) -> Iterator[tuple[str, Prediction]]:
    """Read the digit in each picture; `-` is standard input.

    Yields the name and the prediction of each picture that can be read; the others get a line on standard error.
    """
    for file in files:
        name = click.format_filename(file)
        try:
            with name_in_errors(name):
                if file != "-":
                    check_file(Path(file), MAX_BYTES)
                with click.open_file(file, "rb") as picture:
                    prediction, _ = classifier.read(cast("BinaryIO", picture))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            yield name, prediction
