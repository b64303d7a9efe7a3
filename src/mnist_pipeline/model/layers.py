"""Dropout and batch normalisation: torch's functions, with the same bits on every processor, and faster."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

AddUp = Callable[[Tensor], Tensor]  # adds up a tensor over the processes that share a batch


class Dropout(nn.Dropout):
    """Zero each activation with probability `p`, and scale up the others so that the expected sum stays.

    Sixteen random bits, drawn as integers, decide for each. torch's own draw is MKL's on Intel's processors.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop some of the inputs (N, C, …) in training; return them as they are in evaluation."""
        return inputs * self.draw_factors(inputs.shape, inputs.device) if self.training and self.p else inputs

    def draw_factors(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Draw a factor for each activation of a batch of this shape: 0 or 1 / (1 - p)."""
        by_channel = torch.empty(shape, device="meta").movedim(1, -1).shape  # channels last, as the activations are
        bits = torch.empty(shape.numel() // 4 + 1, dtype=torch.int64, device=device).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: shape.numel()] >= round(self.p * 2**16) - 2**15
        return (kept / (1 - self.p)).view(by_channel).movedim(-1, 1)


class Dropout2d(Dropout):
    """Zero each feature map with probability `p`, and scale up the others (Tompson et al., arXiv:1411.4280)."""

    def draw_factors(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Draw a factor for each feature map of a batch of this shape (N, C, H, W)."""
        return super().draw_factors(torch.Size((*shape[:2], 1, 1)), device)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167) for channels-last activations.

    In training, torch's own is slow there: its threads write to the same cache lines. This one takes each row of pixels
    as the row of a matrix, and adds up the matrix's columns.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.add_up: AddUp = lambda sums: sums  # one process has the whole batch

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (N, C, H, W): in training by the batch's statistics, in evaluation by the running ones."""
        if not self.training:
            return super().forward(inputs)
        images, channels, height, width = inputs.shape
        rows = inputs.permute(0, 2, 3, 1).reshape(images * height, width * channels)
        normalized, mean, variance, count = _Normalize.apply(rows, self.weight, self.bias, self.eps, self.add_up)
        self._update_running_statistics(mean, variance * (count / (count - 1)))
        return cast("Tensor", normalized.view(images, height, width, channels).permute(0, 3, 1, 2))

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        batches = cast("Tensor", self.num_batches_tracked).add_(1)
        momentum = 1 / int(batches) if self.momentum is None else self.momentum  # None: the mean over all batches
        cast("Tensor", self.running_mean).lerp_(mean, momentum)
        cast("Tensor", self.running_var).lerp_(variance, momentum)


class _Normalize(torch.autograd.Function):
    """Normalise rows of pixels (N·H, W·C) by channel; return also the mean, the variance and the count of pixels."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, eps: float, add_up: AddUp) -> tuple[Tensor, ...]:
        channels, width = len(weight), rows.shape[1] // len(weight)
        counts = rows.new_full(rows.shape[1:], len(rows))
        total, squares, count = add_up(_by_channel(channels, rows.sum(0), rows.square().sum(0), counts).double())
        mean = total / count
        variance = squares / count - mean.square()
        mean, inverse = mean.float(), (variance + eps).rsqrt().float()
        scale = weight * inverse
        normalized = torch.addcmul((bias - mean * scale).repeat(width), rows, scale.repeat(width))
        ctx.save_for_backward(rows, mean, inverse, scale, count.float())
        ctx.add_up = add_up
        return normalized, mean, variance.float(), count.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, inverse, scale, count = ctx.saved_tensors
        channels, width = len(mean), rows.shape[1] // len(mean)
        above = gradients[0]
        sums = _by_channel(channels, above.sum(0), (above * rows).sum(0))

        def of_bias_and_weight(sums: Tensor) -> tuple[Tensor, Tensor]:
            return sums[0], (sums[1] - mean * sums[0]) * inverse

        # The rows also change the mean and the variance, of all processes' rows.
        bias, weight = (whole / count for whole in of_bias_and_weight(ctx.add_up(sums)))
        slope = -scale * weight * inverse
        constant = (-scale * bias - slope * mean).repeat(width)
        below = torch.addcmul(torch.addcmul(constant, rows, slope.repeat(width)), above, scale.repeat(width))
        own_bias, own_weight = of_bias_and_weight(sums)
        return below, own_weight, own_bias, None, None


def _by_channel(channels: int, *columns: Tensor) -> Tensor:
    """Add up values of columns (W·C,) over the width; return a row of C sums for each tensor."""
    return torch.stack(columns).view(len(columns), -1, channels).sum(1)
