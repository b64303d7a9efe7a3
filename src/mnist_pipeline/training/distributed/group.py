"""One training in several processes, each with its share of every batch (data parallelism).

Together they do what one process does: they draw the same batches, augmentation and dropout, batch normalisation uses
the statistics of the whole batch, and the gradient is the sum over all shares. Only the order of sums differs.
Source: PyTorch's documentation of DistributedDataParallel.
"""

import copy
import json
import warnings
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
from mnist_pipeline.model.layers import BatchNorm2d, Dropout
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
        """Return the sum of a tensor over the processes."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

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
        self.dropouts: list[SharedDropout] = []
        for name, layer in list(replica.named_modules()):
            if isinstance(layer, BatchNorm2d):
                layer.add_up = group.sum  # the statistics are those of the whole batch
            elif isinstance(layer, Dropout):
                self.dropouts.append(SharedDropout(layer, group))
                replica.set_submodule(name, self.dropouts[-1])
        # The gradients of weights for one channel have other strides, which say the same: that dimension's size is 1.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # Every process computes the buffers itself.
        self.replica = DistributedDataParallel(replica.train(), forward_sync_buffers=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the log-probabilities (N, 10) of images (N, 1, 28, 28)."""
        for dropout in self.dropouts:
            dropout.batch_size = len(images)
        share = self.group.share(images)
        return self.group.gather((self.replica if self.training else self.model)(share), len(images))


class SharedDropout(nn.Module):
    """Dropout for a share. The draw is the one that one process makes for the whole batch."""

    def __init__(self, layer: Dropout, group: Group) -> None:
        super().__init__()
        self.layer, self.group = layer, group
        self.batch_size = 0  # images in the whole batch

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop some of the inputs (N, C, …), and scale up the others."""
        if not self.layer.p:
            return inputs
        factors = self.layer.draw_factors(torch.Size((self.batch_size, *inputs.shape[1:])), inputs.device)
        return inputs * self.group.share(factors)


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
