"""The training loop. It knows neither files nor tracking: whoever calls it does."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from mnist_pipeline.augmentation import augment
from mnist_pipeline.errors import UserError
from mnist_pipeline.inference import Score, predict, score
from mnist_pipeline.optimizer import build_optimizers
from mnist_pipeline.parallel import Group
from mnist_pipeline.params import TrainParams

MONITOR_BATCH_SIZE = 1000  # images; bounds memory
STATISTICS_IMAGES = 10_000  # from which batch normalisation's statistics of averaged weights are measured


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave.

    `training` scores each batch as the network met it, in training mode; `monitor` scores the network after the epoch.
    """

    epoch: int
    learning_rate: float
    training: Score
    monitor: Score
    next_learning_rate: float

    def row(self) -> dict[str, float]:
        """Return the numbers under the names that the history and the tracking give them."""
        return {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "train_loss": self.training.loss,
            "train_accuracy": self.training.accuracy,
            "monitor_loss": self.monitor.loss,
            "monitor_accuracy": self.monitor.accuracy,
        }


@dataclass(frozen=True)
class Training:
    """A training between two epochs: the next epoch depends on this, on the data, the params and the seed alone.

    `average` is the exponential moving average of the model's weights, where it is wanted; `group` are the processes
    that train together, of which each has all of this.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    average: AveragedModel | None
    history: list[EpochResult]
    group: Group

    @property
    def network(self) -> nn.Module:
        """What is tested and kept."""
        return self.average.module if self.average else self.model


def start_training(model: nn.Module, params: TrainParams, group: Group | None = None) -> Training:
    """Return a training of the model, by a group or by this process alone, that has no epoch behind it."""
    average = None
    if params.averaging:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(params.averaging))
    return Training(model, build_optimizers(model, params), average, [], group or Group())


def learning_rate(params: TrainParams, progress: float) -> float:
    """Return the learning rate when `progress` of the epochs, whole ones and a share of the next, are behind.

    Source: torch's StepLR; and OneCycleLR (Smith and Topin, arXiv:1708.07120), cosines from a 25th up to the highest
    and down to next to nothing.
    """
    scheduler = params.scheduler
    if scheduler.kind == "step":
        return params.learning_rate * scheduler.gamma ** (int(progress) // scheduler.step_size)
    warm_up = scheduler.warm_up * params.epochs
    if progress < warm_up:
        start, end, share = params.learning_rate / 25, params.learning_rate, progress / warm_up
    else:
        start, end, share = params.learning_rate, 0.0, (progress - warm_up) / (params.epochs - warm_up)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed all that an epoch draws (the order of the images, dropout) from the run's seed and the epoch alone.

    So an epoch's randomness does not depend on what came before it.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def train(
    training: Training,
    digits: tuple[Tensor, Tensor],
    monitor: tuple[Tensor, Tensor],
    params: TrainParams,
    seed: int,
    on_batch: Callable[[int, Tensor], None] = lambda batch, loss: None,
) -> Iterator[EpochResult]:
    """Train on from where `training` stands, epoch by epoch, and yield the result of each.

    Images are normalised (N, 1, 28, 28), labels (N,), on the model's device. Every image is used once an epoch, the
    last batch holding what is left. Of a group's processes each has all images and works on its share of each batch.
    `on_batch` hears each batch's number, from 0, and its mean loss, as far as this process's share tells.

    Raises:
        UserError: a loss is not finite.
    """
    images, labels = digits
    model, optimizers, group = training.model, training.optimizers, training.group
    network = group.distribute(model)
    for epoch in range(len(training.history) + 1, params.epochs + 1):
        seed_epoch(seed, epoch)
        model.train()
        augmentation = params.augmentation if epoch <= params.epochs - params.augmentation.clean_epochs else None
        loss_sum = torch.zeros((), dtype=torch.float64, device=images.device)
        correct = torch.zeros((), dtype=torch.float64, device=images.device)
        batches = torch.randperm(len(images)).to(images.device).split(params.batch_size)
        for number, batch in enumerate(batches):
            rate = learning_rate(params, epoch - 1 + number / len(batches))
            share = group.share(batch)
            seen = augment(images[share], augmentation, group) if augmentation else images[share]
            with torch.autocast(images.device.type, torch.bfloat16, enabled=params.precision == "bfloat16"):
                log_probabilities = network(seen)
            loss = smoothed_loss(log_probabilities, labels[share], params.label_smoothing) / len(batch)
            model.zero_grad()
            (loss * group.size).backward()  # of the gradients, the processes take the mean
            for optimizer in optimizers:
                for parameters in optimizer.param_groups:
                    parameters["lr"] = rate
                optimizer.step()
            if training.average:
                training.average.update_parameters(model)
            loss_sum += loss.detach() * len(batch)
            correct += (log_probabilities.detach().argmax(dim=1) == labels[share]).sum()
            on_batch(number, loss.detach() * group.size)
        if training.average:
            # What averaged weights and unmoved images bring to batch normalisation, no step has seen.
            update_bn(images[:STATISTICS_IMAGES].split(MONITOR_BATCH_SIZE), training.network)
        result = EpochResult(
            epoch,
            learning_rate(params, epoch - 1),
            Score(group.sum(loss_sum).item() / len(images), int(group.sum(correct)), len(images)),
            score(group.gather(predict(training.network, group.share(monitor[0]), MONITOR_BATCH_SIZE)), monitor[1]),
            learning_rate(params, epoch),
        )
        if not math.isfinite(result.training.loss + result.monitor.loss):
            raise UserError(
                f"epoch {epoch}: the loss is not finite (training {result.training.loss}, monitor "
                f"{result.monitor.loss}): lower train.learning_rate ({params.learning_rate:g})"
            )
        training.history.append(result)
        yield result


def smoothed_loss(log_probabilities: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy, summed over images, with labels of which a share is spread evenly over all classes.

    Source: Szegedy et al., arXiv:1512.00567.
    """
    loss = F.nll_loss(log_probabilities, labels, reduction="sum")
    return (1 - smoothing) * loss - smoothing * log_probabilities.mean(dim=1).sum() if smoothing else loss
