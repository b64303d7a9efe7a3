"""The optimizers: those of torch, and Muon."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mnist_pipeline.common.params import TrainParams

_OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}

# The coefficients of a quintic; iterating it brings all singular values close to 1 (Jordan et al., 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Optimizer):
    """Step along the orthogonalised momentum, so that a weight matrix moves equally far in all singular directions.

    A convolution's weights (outputs, inputs, height, width) count as a matrix with a row for each output. Steps are
    scaled to the size of AdamW's, so the same learning rate and weight decay suit both (Liu et al., arXiv:2502.16982).
    torch's own Muon takes matrices only. Source: Jordan et al., 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step, from the gradients stored with the weights."""
        for group in self.param_groups:
            for weights in group["params"]:
                state = self.state[weights]
                if not state:
                    state["momentum"] = torch.zeros_like(weights)
                state["momentum"].lerp_(weights.grad, 1 - group["momentum"])
                ahead = weights.grad.lerp(state["momentum"], group["momentum"])  # Nesterov momentum
                direction = orthogonalize(ahead.flatten(1))
                size = 0.2 * max(direction.shape) ** 0.5
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.add_(direction.view_as(weights), alpha=-group["lr"] * size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximate the nearest matrix (M, N) with orthonormal rows or columns, whichever are fewer."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    a, b, c = _NEWTON_SCHULZ
    found: Tensor = matrix / (torch.linalg.matrix_norm(matrix) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found


def build_optimizers(model: nn.Module, params: TrainParams) -> list[Optimizer]:
    """Return one optimizer for all weights of a model, or Muon for the convolutions and AdamW for the rest."""
    options: dict[str, Any] = {"lr": params.learning_rate, "weight_decay": params.weight_decay}
    weights = list(model.parameters())
    if params.optimizer != "muon":
        return [_OPTIMIZERS[params.optimizer](weights, **options)]
    matrices = [weight for weight in weights if weight.ndim > 1]
    return [Muon(matrices, **options), AdamW([weight for weight in weights if weight.ndim == 1], **options)]
