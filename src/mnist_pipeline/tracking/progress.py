"""A training on the console: a bar for each epoch on a terminal, otherwise a line for each epoch."""

import math
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mnist_pipeline.common.params import TrainParams
from mnist_pipeline.common.scores import EpochResult


class TrainingLog:
    """Print a training's progress in the specification's format."""

    def __init__(self, params: TrainParams, images: int, monitor_name: str, epoch: int) -> None:
        self.epochs = params.epochs
        self.batches = math.ceil(images / params.batch_size)
        self.monitor_name = monitor_name
        self.terminal = sys.stderr.isatty()
        self.epoch = epoch
        self.bar: tqdm[Any] = tqdm(disable=True)

    def on_batch(self, number: int, loss: Tensor) -> None:
        """Show a batch's number and mean loss on the epoch's bar; without a terminal do nothing."""
        if not self.terminal:
            return
        if number == 0:
            print(f"Epoch: {self.epoch}", flush=True)
            self.bar = tqdm(total=self.batches)
        if number % 10 == 0 or number == self.batches - 1:  # reading a loss waits for the GPU
            self.bar.set_description(f"loss={loss.item():.6f} batch_id={number}", refresh=False)
        self.bar.update()

    def follow(self, epochs: Iterator[EpochResult]) -> Iterator[EpochResult]:
        """Yield the result of each epoch, and show it when the caller asks for the next, and so has saved it."""
        for result in epochs:
            yield result
            self.on_epoch(result)

    def on_epoch(self, result: EpochResult) -> None:
        """Close the bar and print the epoch's scores, and the learning rate when it changes."""
        self.bar.close()
        if not self.terminal:
            print(f"Epoch: {result.epoch}/{self.epochs}  Training: Average loss: {result.training.loss:.4f}", end="  ")
        score = result.monitor
        print(
            f"{self.monitor_name} set: Average loss: {score.loss:.4f}, "
            f"Accuracy: {score.correct}/{score.total} ({score.accuracy:.2%})",
            flush=True,
        )
        if result.next_learning_rate != result.learning_rate and result.epoch < self.epochs:
            print(f"[LR Scheduler Step: {result.learning_rate:g} → {result.next_learning_rate:g}]", flush=True)
        self.epoch = result.epoch + 1
