"""The specification's network: three blocks of convolutions, with 19,210 parameters unless the params say otherwise."""

from collections import OrderedDict
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_pipeline.common.params import Count, Probability
from mnist_pipeline.model.layers import BatchNorm2d, Dropout, Dropout2d

_DROPOUT = {"element": Dropout, "channel": Dropout2d}

# SiLU (Hendrycks and Gimpel, arXiv:1606.08415) is x·sigmoid(x).
_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class Net(nn.Module):
    """Map normalised images (N, 1, 28, 28) to log-probabilities (N, classes)."""

    def __init__(
        self,
        classes: int,
        channels: Annotated[list[Count], Field(min_length=6, max_length=6)],
        bias: bool,
        activation: Literal["relu", "silu"],
        pooling: Literal[2, 3],
        dropout: Probability,
        dropout_kind: Literal["element", "channel"],
    ) -> None:
        super().__init__()
        c1, c2, c3, c4, c5, c6 = channels

        def convolve(number: int, inputs: int, outputs: int, padding: int) -> dict[str, nn.Module]:
            return {
                f"conv{number}": nn.Conv2d(inputs, outputs, 3, padding=padding, bias=bias),
                f"bn{number}": BatchNorm2d(outputs),
                f"activation{number}": _ACTIVATIONS[activation](),
            }

        def shrink(number: int) -> dict[str, nn.Module]:
            return {
                f"pool{number}": nn.MaxPool2d(pooling, stride=2, padding=(pooling - 1) // 2),
                f"dropout{number}": _DROPOUT[dropout_kind](dropout),
            }

        def classify() -> dict[str, nn.Module]:
            return {"conv7": nn.Conv2d(c6, classes, 3), "gap": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}

        # A layer draws its initial weights when it is made, so the results depend on the order of these calls.
        self.block1 = _sequence(convolve(1, 1, c1, padding=1), convolve(2, c1, c2, padding=1), shrink(1))
        self.block2 = _sequence(convolve(3, c2, c3, padding=1), convolve(4, c3, c4, padding=1), shrink(2))
        self.block3 = _sequence(convolve(5, c4, c5, padding=0), convolve(6, c5, c6, padding=0), classify())

    def forward(self, images: Tensor) -> Tensor:
        """Return the log-probabilities (N, classes) of images (N, 1, 28, 28)."""
        images = images.to(memory_format=torch.channels_last)  # the faster order for all layers
        return F.log_softmax(self.block3(self.block2(self.block1(images))), dim=1)


def _sequence(*steps: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, layer) for step in steps for name, layer in step.items()))
