"""A trained network that reads one digit at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.paths import MODEL
from mnist_pipeline.data.digits import CLASSES, SIDE
from mnist_pipeline.model.model_file import load_model


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
        if not path.exists():
            raise UserError(f"{path} is absent: `make repro` trains the network, `dvc pull` fetches it")
        model = load_model(path)
        self.network, self.normalization = model.network, model.normalization
        torch.set_num_threads(1)  # more would only wait for one another over a single image

    def classify(self, pixels: NDArray[np.uint8]) -> Prediction:
        """Read a digit (28, 28), white on black, 0 to 255."""
        scaled = torch.tensor(pixels, dtype=torch.float32) / 255
        images = ((scaled - self.normalization.mean) / self.normalization.std).view(1, 1, SIDE, SIDE)
        with torch.inference_mode():
            probabilities = self.network(images)[0].double().softmax(dim=0).tolist()  # doubles sum to 1
        digit = max(range(CLASSES), key=probabilities.__getitem__)
        return Prediction(digit, probabilities[digit], probabilities)
