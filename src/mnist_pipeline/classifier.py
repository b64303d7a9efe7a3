"""A trained network that reads one digit at a time."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from mnist_pipeline.errors import UserError
from mnist_pipeline.model import DESCRIPTION, load_model
from mnist_pipeline.paths import MODEL


@dataclass(frozen=True)
class Prediction:
    """A digit, its probability, and the probability of each digit from 0 to 9."""

    digit: int
    probability: float
    probabilities: list[float]


class Classifier:
    """The network of a model file, loaded once, on one thread of the CPU.

    Raises:
        UserError: the file is absent, damaged, or of another network.
    """

    def __init__(self, path: Path = MODEL) -> None:
        torch.set_num_threads(1)  # more would only wait for one another over a single image
        self.model = load_model(path)
        self.mean, self.std = read_normalization(path)

    def classify(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Read a digit (28, 28), white on black, 0 to 255."""
        image = (torch.from_numpy(pixels).float() / 255 - self.mean) / self.std
        with torch.inference_mode():
            log_probabilities = self.model(image[None, None])[0]
        probabilities = log_probabilities.double().softmax(dim=0).tolist()  # in double precision they sum to 1
        digit = max(range(len(probabilities)), key=probabilities.__getitem__)
        return Prediction(digit, probabilities[digit], probabilities)


def read_normalization(path: Path) -> tuple[float, float]:
    """Return the mean and the standard deviation by which a model's input is normalised, from its file.

    Raises:
        UserError: the file does not say.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            normalization = json.loads(file.metadata()[DESCRIPTION])["normalization"]
        return float(normalization["mean"]), float(normalization["std"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say how its input is normalised ({error!r}): `dvc repro` makes it") from None
