"""One training in several processes, each with its share of every batch (data parallelism).

Together they do what one alone does: batches, augmentation and dropout are drawn as for one, batch normalisation has
the statistics of the whole batch, the gradient is the sum over all shares. Only the order of sums differs.
Source: PyTorch's documentation of DistributedDataParallel.
"""

import copy
import json
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CPU = torch.device("cpu")


class Group:
    """The processes that train together, seen from one. In a group of one nothing is shared, and nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device = CPU, drives: bool = True) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        ranks = torch.zeros(size, dtype=torch.int64, device=device)
        ranks[rank] = drives
        self.leader = int(self.sum(ranks).argmax())  # the first that drives; among several machines any may have rank 0
        self.batch_size = 0  # images of the batch that was shared last

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes, tracks and speaks."""
        return self.rank == self.leader

    def follows(self, epochs: Iterable[object]) -> bool:
        """Work through all epochs and return True, unless this process leads, which has more to do after each."""
        if not self.leads:
            for _ in epochs:
                pass
        return not self.leads

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch that all of them hold; parts differ by one image at most."""
        self.batch_size = len(batch)
        return batch if self.size == 1 else batch.tensor_split(self.size)[self.rank]

    def gather(self, share: Tensor) -> Tensor:
        """Put together what all processes made of their shares of a batch, in the order of the batch."""
        if self.size == 1:
            return share
        whole = torch.zeros(self.batch_size, *share.shape[1:], dtype=share.dtype, device=share.device)
        self.share(whole).copy_(share)
        return self.sum(whole)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes; gradients flow back to each."""
        return values if self.size == 1 else cast("Tensor", Sum.apply(values))

    def send(self, content: bytes, source: int | None = None) -> bytes:
        """Return in every process what the one of rank `source` has, or the leading one."""
        if self.size == 1:
            return content
        source = self.leader if source is None else source
        length = torch.tensor(len(content), device=self.device)
        dist.broadcast(length, source)
        sent = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            sent.copy_(torch.from_numpy(np.frombuffer(content, np.uint8).copy()))
        dist.broadcast(sent, source)
        return sent.cpu().numpy().tobytes()

    def exchange(self, value: Any) -> list[Any]:
        """Return what all processes have, in the order of their ranks; values are of JSON's types."""
        return [json.loads(self.send(json.dumps(value).encode(), rank)) for rank in range(self.size)]

    def distribute(self, model: nn.Module) -> nn.Module:
        """Return what stands for a model in a step of training: it has the model's very weights and statistics."""
        if self.size == 1:
            return model
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        replica = copy.deepcopy(model, cast("dict[int, Any]", tensors))
        for name, layer in list(replica.named_modules()):
            if isinstance(layer, nn.BatchNorm2d):
                replica.set_submodule(name, BatchNorm(layer, self))
            elif isinstance(layer, nn.Dropout | nn.Dropout2d):
                replica.set_submodule(name, Dropout(layer, self))
        return DistributedDataParallel(replica.train())


class Sum(torch.autograd.Function):
    """The sum of a tensor over the processes. What one of them puts in, reaches the loss of all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Add up."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Add up what flows back, too."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167) of a share by the whole batch's mean and variance.

    torch's SyncBatchNorm is the same for GPUs alone.
    """

    def __init__(self, layer: nn.BatchNorm2d, group: Group) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        # Not registered as buffers, which DistributedDataParallel would send at each step: all processes compute them.
        self.running = cast(
            "tuple[Tensor, Tensor, Tensor]", (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        )
        self.momentum, self.eps = cast("float", layer.momentum), layer.eps
        self.group = group

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (N, C, H, W), of which there may be none, and update the running statistics."""
        count = self.group.batch_size * inputs.shape[2] * inputs.shape[3]
        values = inputs.float()
        sums = torch.stack([values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))]).double()
        mean, square = self.group.sum(sums) / count
        variance = square - mean.square()
        with torch.no_grad():
            running_mean, running_variance, batches = self.running
            running_mean.lerp_(mean.float(), self.momentum)
            running_variance.lerp_((variance * count / (count - 1)).float(), self.momentum)
            batches.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        normalized: Tensor = values * scale.float().view(-1, 1, 1) + shift.float().view(-1, 1, 1)
        return normalized.to(inputs.dtype)


class Dropout(nn.Module):
    """Dropout of a share, drawn for the whole batch as torch draws it on the CPU."""

    def __init__(self, layer: nn.Dropout | nn.Dropout2d, group: Group) -> None:
        super().__init__()
        self.keep = 1 - layer.p
        self.maps = isinstance(layer, nn.Dropout2d)
        self.group = group

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop some of inputs (N, C, H, W), and enlarge the others as much."""
        if self.keep == 1:
            return inputs
        size = (1, 1) if self.maps else inputs.shape[2:]
        noise = inputs.new_empty(self.group.batch_size, inputs.shape[1], *size).bernoulli_(self.keep).div_(self.keep)
        return inputs * self.group.share(noise)
