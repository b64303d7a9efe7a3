"""One training in several processes, each with its share of every batch (data parallelism).

Together they do what one process does: they draw the same batches, augmentation and dropout, batch normalisation uses
the statistics of the whole batch, and the gradient is the sum over all shares. Only the order of sums differs.
Source: PyTorch's documentation of DistributedDataParallel.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_pipeline.common.params import TrainParams
from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.training.checkpoint import dump_training, load_training
from mnist_pipeline.training.loop import OnBatch, Training, train

_CPU = torch.device("cpu")


class Group:
    """The processes that train together, seen from one of them. A group of one sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device = _CPU, can_lead: bool = True) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        candidates = torch.zeros(size, dtype=torch.int64, device=device)
        candidates[rank] = can_lead
        self.leader = int(self.sum(candidates).argmax())  # the lowest rank that can lead, which need not be 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes, tracks and prints."""
        return self.rank == self.leader

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch that all of them hold; parts differ by one image at most."""
        return batch.tensor_split(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes; gradients flow back to each."""
        return values if self.size == 1 else cast("Tensor", _Sum.apply(values))

    def gather(self, share: Tensor, count: int) -> Tensor:
        """Put the processes' results for their shares together; return the results (count, …) for the whole batch.

        All processes then compute the same loss. Each gets back the gradient of its own share, multiplied by the number
        of processes because DistributedDataParallel averages gradients.
        """
        return share if self.size == 1 else cast("Tensor", _Gather.apply(share, count, self))

    def send(self, content: bytes, source: int | None = None) -> bytes:
        """Send `content` from the process of rank `source`, or from the leader, to all; return it in each."""
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
        """Return the values of all processes in the order of their ranks; JSON must be able to hold a value."""
        return [json.loads(self.send(json.dumps(value).encode(), rank)) for rank in range(self.size)]


def train_in_group(
    group: Group,
    training: Training,
    digits: tuple[Tensor, Tensor],
    monitor: tuple[Tensor, Tensor],
    params: TrainParams,
    seed: int,
    on_batch: OnBatch = lambda batch, loss: None,
) -> Iterator[EpochResult]:
    """Do what `loop.train` does; each process computes its share of every batch.

    All processes hold all images, and start from the state of the leader's training. Each augments the whole batch,
    and tests averaged weights by itself.
    """
    if group.size > 1:
        state = group.send(dump_training(training))
        if not group.leads:
            load_training(training, state)
        training = replace(training, model=SharedModel(training.model, group))
    yield from train(training, digits, monitor, params, seed, on_batch)


class SharedModel(nn.Module):
    """A model whose work is shared: it takes a whole batch, computes a share, and returns results for the whole.

    Parameters and buffers are the model's own.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        super().__init__()
        self.model, self.group = model, group
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        replica = copy.deepcopy(model, cast("dict[int, Any]", shared))
        self.layers: list[BatchNorm | Dropout] = []
        for name, layer in list(replica.named_modules()):
            if isinstance(layer, nn.BatchNorm2d | nn.Dropout | nn.Dropout2d):
                whole = BatchNorm(layer, group) if isinstance(layer, nn.BatchNorm2d) else Dropout(layer, group)
                replica.set_submodule(name, whole)
                self.layers.append(whole)
        self.replica = DistributedDataParallel(replica.train())

    def forward(self, images: Tensor) -> Tensor:
        """Return the log-probabilities (N, 10) of images (N, 1, 28, 28)."""
        for layer in self.layers:
            layer.batch_size = len(images)
        share = self.group.share(images)
        return self.group.gather((self.replica if self.training else self.model)(share), len(images))


class BatchNorm(nn.Module):
    """Normalise a share by the whole batch's mean and variance (Ioffe and Szegedy, arXiv:1502.03167).

    torch's SyncBatchNorm does this on GPUs only.
    """

    def __init__(self, layer: nn.BatchNorm2d, group: Group) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        # Not registered as buffers: DistributedDataParallel would send them, and every process computes them itself.
        self.running = cast(
            "tuple[Tensor, Tensor, Tensor]", (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        )
        self.momentum, self.eps = cast("float", layer.momentum), layer.eps
        self.group = group
        self.batch_size = 0  # images in the whole batch

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (N, C, H, W), where N may be 0, and update the running statistics."""
        count = self.batch_size * inputs.shape[2] * inputs.shape[3]
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
    """Dropout for a share; the draw is the one that torch makes for the whole batch on the CPU."""

    def __init__(self, layer: nn.Dropout | nn.Dropout2d, group: Group) -> None:
        super().__init__()
        self.keep = 1 - layer.p
        self.whole_maps = isinstance(layer, nn.Dropout2d)
        self.group = group
        self.batch_size = 0  # images in the whole batch

    def forward(self, inputs: Tensor) -> Tensor:
        """Zero some of the inputs (N, C, H, W), and scale up the others so that the expected sum stays."""
        if self.keep == 1:
            return inputs
        size = (1, 1) if self.whole_maps else inputs.shape[2:]
        noise = inputs.new_empty(self.batch_size, inputs.shape[1], *size).bernoulli_(self.keep).div_(self.keep)
        return inputs * self.group.share(noise)


class _Sum(torch.autograd.Function):
    """Sum a tensor over the processes. Each process's values enter the loss of all, so backward sums gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, count: int, group: Group) -> Tensor:
        ctx.group = group
        whole = torch.zeros(count, *share.shape[1:], dtype=share.dtype, device=share.device)
        group.share(whole).copy_(share)
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.share(gradients[0]) * ctx.group.size, None, None
