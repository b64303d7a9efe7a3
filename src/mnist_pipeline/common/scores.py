"""What a training measures: the score on some images, and the results of an epoch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The mean negative log-likelihood (nats an image) and how many of `total` images were right."""

    loss: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of right images, 0 to 1."""
        return self.correct / self.total


@dataclass(frozen=True)
class EpochResult:
    """The results of one epoch.

    `training` scores each batch just before the network learns from it; `monitor` scores the network after the epoch.
    """

    epoch: int
    learning_rate: float
    training: Score
    monitor: Score
    next_learning_rate: float

    def row(self) -> dict[str, float]:
        """Return the numbers under the names that the history and MLflow use."""
        return {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "train_loss": self.training.loss,
            "train_accuracy": self.training.accuracy,
            "monitor_loss": self.monitor.loss,
            "monitor_accuracy": self.monitor.accuracy,
        }
