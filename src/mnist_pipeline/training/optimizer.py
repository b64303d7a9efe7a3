"""The optimizers: those of torch, and Muon."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from mnist_pipeline.common.params import TrainParams

_ADAM = {"adam": Adam, "adamw": AdamW}

# The coefficients of a quintic; iterating it brings all singular values close to 1 (Jordan et al., 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Optimizer):
    """Step along the orthogonalised momentum, so that a weight matrix moves equally far in all singular directions.

    A convolution's weights (outputs, inputs, height, width) count as a matrix with a row for each output. Steps are
    scaled to the size of AdamW's, so the same learning rate and weight decay suit both (Liu et al., arXiv:2502.16982).
    torch's own Muon takes matrices only. Source: Jordan et al., 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step, from the gradients stored with the weights."""
        for group in self.param_groups:
            ahead = [self._move_momentum(weights, group["momentum"]) for weights in group["params"]]
            for weights, direction in zip(group["params"], orthogonalize(ahead), strict=True):
                size = 0.2 * max(direction.shape) ** 0.5
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.add_(direction.view_as(weights), alpha=-group["lr"] * size)

    def _move_momentum(self, weights: nn.Parameter, momentum: float) -> Tensor:
        """Add the gradient to the weights' momentum; return Nesterov's momentum as a matrix."""
        state = self.state[weights]
        if not state:
            state["momentum"] = torch.zeros_like(weights)
        gradient = cast("Tensor", weights.grad)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum).flatten(1)


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Approximate for each matrix (M, N) the nearest one with orthonormal rows or columns, whichever are fewer.

    An iteration multiplies a matrix X by aI + bG + c(GG), where G is XXᵀ. All that depends on G alone, which is small:
    so this iterates G, of all matrices together, and multiplies each matrix once.
    """
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T for matrix in matrices]
    side = max(len(matrix) for matrix in wide)
    gram = torch.stack([F.pad(_multiply(matrix, matrix.T), (0, side - len(matrix)) * 2) for matrix in wide])
    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1) + 1e-14
    identity = torch.eye(side, device=gram.device)
    a, b, c = _NEWTON_SCHULZ
    gram = gram / squared_norm
    factors = identity * squared_norm.rsqrt()
    for _ in range(_ITERATIONS):
        factor = a * identity + b * gram + c * _multiply(gram, gram)
        factors = _multiply(factor, factors)
        gram = _multiply(_multiply(factor, factor), gram)
    found = [
        _multiply(factor[: len(matrix), : len(matrix)], matrix) for factor, matrix in zip(factors, wide, strict=True)
    ]
    return [new if new.shape == old.shape else new.T for new, old in zip(found, matrices, strict=True)]


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices (…, M, K) and (…, K, N). The operator `@` would take them to MKL (see `common.kernels`)."""
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def build_optimizers(model: nn.Module, params: TrainParams) -> list[Optimizer]:
    """Return one optimizer for all weights of a model, or Muon for the convolutions and AdamW for the rest."""
    options: dict[str, Any] = {"lr": params.learning_rate, "weight_decay": params.weight_decay}
    fused: dict[str, Any] = options | {"fused": True}  # faster; and the other way takes square roots from MKL
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    match params.optimizer:
        case "adam" | "adamw" as name:
            return [_ADAM[name](weights, betas=(params.momentum, 0.999), **fused)]
        case "sgd":
            return [SGD(weights, momentum=params.momentum, **fused)]
        case "muon":
            matrices = [weight for weight in weights if weight.ndim > 1]
            others = [weight for weight in weights if weight.ndim < 2]
            return [Muon(matrices, momentum=params.momentum, **options), AdamW(others, **fused)]
