"""The network's layers, noted as images pass through any module: shapes, parameters, receptive fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from mnist_pipeline.data.digits import SIDE
from mnist_pipeline.model.inference import evaluation_mode


@dataclass(frozen=True)
class Layer:
    """A call of a module that calls no other, or that has parameters of its own.

    Shapes leave out the batch. The value in the middle of the output depends on a square of the image; the receptive
    field is the side of that square in pixels. A text such as 3×1 stands for a size that is not square.
    """

    block: str
    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: int | str | None
    padding: int | str | None
    parameters: int
    receptive_field: int | str | None

    @property
    def path(self) -> str:
        """The module's name in the network."""
        return f"{self.block}.{self.name}" if self.block else self.name


def list_layers(model: nn.Module) -> list[Layer]:
    """List the layers of a network in the order in which they begin, by passing images through it.

    Each image lacks a row or a column (it holds NaN there); what comes out as NaN depends on that row or column.
    """
    paths = {module: path for path, module in model.named_modules()}
    layers: list[Layer | None] = []  # None: a module that has not ended, or only calls others
    begun: list[int] = []
    counted: set[nn.Parameter] = set()

    def begin(*_: object) -> None:
        begun.append(len(layers))
        layers.append(None)

    def end(module: nn.Module, inputs: object, output: object) -> None:
        place, (given, made) = begun.pop(), map(_first_tensor, (inputs, output))
        is_inner = place == len(layers) - 1
        # The network itself has what it used without a call of the module that holds it.
        own = {weights for weights in module.parameters(is_inner or module is model) if weights.requires_grad} - counted
        counted.update(own)
        if own or is_inner:
            *block, name = paths[module].split(".", 1)
            kind = type(module).__name__
            layers[place] = Layer(
                "".join(block),
                name or kind,
                kind,
                tuple(given.shape[1:]),
                tuple(made.shape[1:]),
                _side(getattr(module, "kernel_size", None)),
                _side(getattr(module, "padding", None)),
                sum(weights.numel() for weights in own),
                _receptive_field(made),
            )

    device = next((weights.device for weights in model.parameters()), None)
    images = torch.zeros(2 * SIDE, 1, SIDE, SIDE, device=device)
    for place in range(SIDE):
        images[place, :, place], images[SIDE + place, :, :, place] = torch.nan, torch.nan
    with evaluation_mode(model), register_module_forward_pre_hook(begin), register_module_forward_hook(end):
        model(images)
    return [layer for layer in layers if layer]


def _first_tensor(values: object) -> Tensor:
    return next((value for value in tree_leaves(values) if isinstance(value, Tensor)), torch.empty(0))


def _receptive_field(values: Tensor) -> int | str | None:
    """Return how many rows and columns, between the outermost ones, the value in the middle depends on."""
    if len(values) != 2 * SIDE:
        return None  # the images are not along the first axis
    while values.dim() > 1:
        values = values.select(1, values.shape[1] // 2)
    seen = [part.isnan().nonzero() for part in values.split(SIDE)]
    lengths = tuple(int(places.max() - places.min()) + 1 if len(places) else 0 for places in seen)
    return cast("int | str", _side(lengths))


def _side(sizes: Any) -> Any:
    """Return the side of a square, which PyTorch gives as one number or as two equal ones; other sizes as text."""
    if not isinstance(sizes, tuple):
        return sizes
    return sizes[0] if len(set(sizes)) == 1 else "×".join(map(str, sizes))


def group_into_steps(layers: Sequence[Layer]) -> list[tuple[str, list[list[Layer]]]]:
    """Group the layers of each block into steps: one that has weights or pools, with the pointwise ones after it."""
    blocks: list[tuple[str, list[list[Layer]]]] = []
    for block, members in groupby(layers, key=lambda layer: layer.block):
        steps: list[list[Layer]] = []
        for layer in members:
            has_weights = layer.parameters and "Norm" not in layer.kind and layer.kind != "PReLU"
            if not steps or layer.kernel or "Pool" in layer.kind or has_weights:
                steps.append([])
            steps[-1].append(layer)
        blocks.append((block, steps))
    return blocks
