"""The training loop. It knows neither files nor tracking; its callers do."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import TrainParams
from mnist_pipeline.common.scores import EpochResult, Score
from mnist_pipeline.model.inference import predict, score
from mnist_pipeline.training.augmentation import augment
from mnist_pipeline.training.calibration import calibrate
from mnist_pipeline.training.optimizer import build_optimizers

_MONITOR_BATCH_SIZE = 1000  # images; bounds memory
_SAMPLE_SIZE = 10_000  # unaugmented images, to measure what averaged weights and smoothed labels need

OnBatch = Callable[[int, Tensor], None]
TrainingLoop = Callable[..., Iterator[EpochResult]]  # `train`, or `train_in_group` for several processes


@dataclass(frozen=True)
class Training:
    """The state of a training between two epochs; with data, params and seed it decides the next epoch.

    `average` is the exponential moving average of the model's weights, if the params ask for one.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    average: AveragedModel | None
    history: list[EpochResult]

    @property
    def network(self) -> nn.Module:
        """The network to test and keep: the average, if there is one, else the model."""
        return self.average.module if self.average else self.model


def start_training(model: nn.Module, params: TrainParams) -> Training:
    """Return a training of the model before its first epoch."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(params.averaging)) if params.averaging else None
    return Training(model, build_optimizers(model, params), average, [])


def train(
    training: Training,
    digits: tuple[Tensor, Tensor],
    monitor: tuple[Tensor, Tensor],
    params: TrainParams,
    seed: int,
    on_batch: OnBatch = lambda batch, loss: None,
) -> Iterator[EpochResult]:
    """Train the epochs that `training` has not done yet; yield the result of each.

    `digits` and `monitor` are normalised images (N, 1, 28, 28) and labels (N,) on the model's device. `on_batch` gets
    each batch's number, from 0, and its mean loss.

    Raises:
        UserError: a loss is not finite, or `calibrate` refuses the network.
    """
    sample = digits[0][:_SAMPLE_SIZE], digits[1][:_SAMPLE_SIZE]
    for epoch in range(len(training.history) + 1, params.epochs + 1):
        seed_epoch(seed, epoch)
        train_score = _train_epoch(training, digits, params, epoch, on_batch)
        if training.average:  # the averaged weights need their own BatchNorm statistics
            update_bn(sample[0].split(_MONITOR_BATCH_SIZE), training.network)
        if params.label_smoothing and epoch == params.epochs:
            calibrate(training.network, sample, _MONITOR_BATCH_SIZE)
        monitor_score = score(predict(training.network, monitor[0], _MONITOR_BATCH_SIZE), monitor[1])
        if not math.isfinite(train_score.loss + monitor_score.loss):
            raise UserError(
                f"epoch {epoch}: the loss is not finite (training {train_score.loss}, monitor {monitor_score.loss}): "
                f"lower train.learning_rate ({params.learning_rate:g})"
            )
        rate, next_rate = learning_rate(params, epoch - 1), learning_rate(params, epoch)
        training.history.append(EpochResult(epoch, rate, train_score, monitor_score, next_rate))
        yield training.history[-1]


def _train_epoch(
    training: Training, digits: tuple[Tensor, Tensor], params: TrainParams, epoch: int, on_batch: OnBatch
) -> Score:
    """Take one step for each batch. Every image is used once; the last batch can be smaller."""
    (images, labels), model = digits, training.model
    model.train()
    augmentation = params.augmentation if epoch <= params.epochs - params.augmentation.clean_epochs else None
    loss_sum = torch.zeros((), dtype=torch.float64, device=images.device)
    correct = torch.zeros((), dtype=torch.float64, device=images.device)
    batches = torch.randperm(len(images)).to(images.device).split(params.batch_size)
    for number, batch in enumerate(batches):
        rate = learning_rate(params, epoch - 1 + number / len(batches))
        seen = augment(images[batch], augmentation) if augmentation else images[batch]
        log_probabilities = model(seen)
        loss = smoothed_cross_entropy(log_probabilities, labels[batch], params.label_smoothing) / len(batch)
        model.zero_grad()
        loss.backward()
        for optimizer in training.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if training.average:
            training.average.update_parameters(model)
        loss_sum += loss.detach() * len(batch)
        correct += (log_probabilities.detach().argmax(dim=1) == labels[batch]).sum()
        on_batch(number, loss.detach())
    return Score(loss_sum.item() / len(images), int(correct), len(images))


def learning_rate(params: TrainParams, progress: float) -> float:
    """Return the learning rate after `progress` epochs; a fraction is a share of the next epoch.

    Source: torch's StepLR and OneCycleLR (Smith and Topin, arXiv:1708.07120). One cycle rises along a cosine from 1/25
    of the highest rate and falls along another to 0.
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
    """Seed an epoch's random draws with the run's seed and the epoch, so that they do not depend on earlier epochs."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def smoothed_cross_entropy(log_probabilities: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of log-probabilities (N, 10) and labels (N,), summed over images.

    Label smoothing spreads a share of each label over all classes. Source: Szegedy et al., arXiv:1512.00567.
    """
    loss = F.nll_loss(log_probabilities, labels, reduction="sum")
    return (1 - smoothing) * loss - smoothing * log_probabilities.mean(dim=1).sum() if smoothing else loss
