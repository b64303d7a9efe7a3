"""The network's layers, read off the module: shapes, parameters, receptive fields."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mnist_pipeline.data.digits import SIDE
from mnist_pipeline.model.inference import evaluation_mode


@dataclass(frozen=True)
class Layer:
    """One layer of the network.

    Shapes leave out the batch. One output value depends on a square of the image; the receptive field is the side of
    that square in pixels, as if the image had no border.
    """

    block: str
    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: int | None
    padding: int | None
    parameters: int
    receptive_field: int


def list_layers(model: nn.Module) -> list[Layer]:
    """List the layers of a network, which is a sequence of blocks, by passing an image through them.

    The receptive field r and the distance j between neighbouring outputs, in pixels, grow layer by layer:
    r += (kernel - 1) * j, then j *= stride (Araujo et al., 2019, doi:10.23915/distill.00021).
    """
    layers = []
    activation = torch.zeros(1, 1, SIDE, SIDE, device=next(model.parameters()).device)
    receptive_field, distance = 1, 1
    with evaluation_mode(model):
        for block_name, block in model.named_children():
            for name, module in block.named_children():
                output = module(activation)
                kernel, stride, padding = (_window(module, size) for size in ("kernel_size", "stride", "padding"))
                if kernel:
                    receptive_field += (kernel - 1) * distance
                    distance *= stride or 1
                layers.append(
                    Layer(
                        block_name,
                        name,
                        type(module).__name__,
                        tuple(activation.shape[1:]),
                        tuple(output.shape[1:]),
                        kernel,
                        padding,
                        sum(parameter.numel() for parameter in module.parameters()),
                        receptive_field,
                    )
                )
                activation = output
    return layers


def _window(module: nn.Module, attribute: str) -> int | None:
    """Return a size of a square window; PyTorch gives it as one number or as two equal ones."""
    size: int | tuple[int, ...] | None = getattr(module, attribute, None)
    return size[0] if isinstance(size, tuple) else size


def group_into_steps(layers: Sequence[Layer]) -> dict[str, list[list[Layer]]]:
    """Group the layers of each block into steps: a convolution or a pooling with the pointwise layers after it."""
    blocks: dict[str, list[list[Layer]]] = {}
    for layer in layers:
        steps = blocks.setdefault(layer.block, [])
        if "Conv" in layer.kind or "Pool" in layer.kind or not steps:
            steps.append([])
        steps[-1].append(layer)
    return blocks
