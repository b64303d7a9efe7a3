"""What a trained network gets right and wrong on the test images."""

from dataclasses import asdict

from torch import Tensor

from mnist_pipeline.data import CLASSES
from mnist_pipeline.inference import score


def measure(log_probabilities: Tensor, labels: Tensor) -> dict[str, object]:
    """Return loss (nats an image), accuracy and counts, over all images and for each class.

    `log_probabilities` are (N, 10), `labels` (N,) with some of each class.
    """
    right = log_probabilities.argmax(dim=1) == labels
    total = score(log_probabilities, labels)
    return {
        "test_accuracy": total.accuracy,
        **{f"test_{name}": value for name, value in asdict(total).items()},
        "test_misclassified": total.total - total.correct,
        "test_per_class_accuracy": {
            str(digit): right[labels == digit].double().mean().item() for digit in range(CLASSES)
        },
    }


def predictions(log_probabilities: Tensor, labels: Tensor) -> list[dict[str, object]]:
    """Return a row for each image: its place in the test file, its label, the prediction and its probability."""
    probability, prediction = log_probabilities.exp().max(dim=1)
    rows = zip(labels.tolist(), prediction.tolist(), probability.tolist(), strict=True)
    return [
        {
            "index": index,
            "label": label,
            "prediction": predicted,
            "probability": f"{confidence:.6f}",
        }
        for index, (label, predicted, confidence) in enumerate(rows)
    ]
