"""The training loop. It knows neither files nor tracking: whoever calls it does."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_pipeline.errors import UserError
from mnist_pipeline.inference import Score, predict, score
from mnist_pipeline.params import TrainParams

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
MONITOR_BATCH_SIZE = 1000  # images; bounds memory


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
    """A training between two epochs: the next epoch depends on this, on the data, the params and the seed alone."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    history: list[EpochResult]


def start_training(model: nn.Module, params: TrainParams) -> Training:
    """Return a training of the model that has no epoch behind it."""
    optimizer = OPTIMIZERS[params.optimizer](
        model.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, params.scheduler.step_size, params.scheduler.gamma)
    return Training(model, optimizer, scheduler, history=[])


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
    last batch holding what is left. `on_batch` hears each batch's number, from 0, and its mean loss.

    Raises:
        UserError: a loss is not finite.
    """
    images, labels = digits
    model, optimizer, scheduler = training.model, training.optimizer, training.scheduler
    for epoch in range(len(training.history) + 1, params.epochs + 1):
        seed_epoch(seed, epoch)
        model.train()
        learning_rate = float(scheduler.get_last_lr()[0])
        loss_sum = torch.zeros((), dtype=torch.float64, device=images.device)
        correct = torch.zeros((), dtype=torch.int64, device=images.device)
        for number, batch in enumerate(torch.randperm(len(images)).to(images.device).split(params.batch_size)):
            log_probabilities = model(images[batch])
            loss = F.nll_loss(log_probabilities, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(batch)
            correct += (log_probabilities.detach().argmax(dim=1) == labels[batch]).sum()
            on_batch(number, loss.detach())
        scheduler.step()
        result = EpochResult(
            epoch,
            learning_rate,
            Score(loss_sum.item() / len(images), int(correct), len(images)),
            score(predict(model, monitor[0], MONITOR_BATCH_SIZE), monitor[1]),
            float(scheduler.get_last_lr()[0]),
        )
        if not math.isfinite(result.training.loss + result.monitor.loss):
            raise UserError(
                f"epoch {epoch}: the loss is not finite (training {result.training.loss}, monitor "
                f"{result.monitor.loss}): lower train.learning_rate ({params.learning_rate:g})"
            )
        training.history.append(result)
        yield result
