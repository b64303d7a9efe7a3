"""The metrics of a trained network on the test images, plain and corrupted."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mnist_pipeline.common.params import Normalization
from mnist_pipeline.data.digits import DIGITS, Digits
from mnist_pipeline.evaluation.corruptions import CORRUPTIONS
from mnist_pipeline.evaluation.disputed import disputed_images
from mnist_pipeline.model.inference import predict, score
from mnist_pipeline.model.model_file import TrainedModel
from mnist_pipeline.model.network import count_parameters

BIN_COUNT = 15  # bins of equal width between 0 and 1, as in Guo et al., arXiv:1706.04599
SCORES = ("accuracy", "loss", "calibration_error")  # measured under each corruption


@dataclass(frozen=True)
class Evaluation:
    """The metrics, and the rows of the tables of predictions, calibration and robustness."""

    metrics: dict[str, object]
    predictions: list[dict[str, object]]
    calibration: list[dict[str, float]]
    robustness: list[dict[str, Any]]


def evaluate(model: TrainedModel, digits: Digits, batch_size: int, device: torch.device) -> Evaluation:
    """Test a network on the digits and on corrupted copies of them."""
    network = model.network.to(device)
    images, labels = digits.tensors(model.normalization, device)
    log_probabilities = predict(network, images, batch_size)
    robustness = _measure_robustness(network, digits, model.normalization, batch_size, device)
    return Evaluation(
        compute_metrics(log_probabilities, labels, disputed_images(digits), model.classes)
        | corrupted_accuracies(robustness)
        | {"parameters": count_parameters(network)},
        prediction_rows(log_probabilities, labels),
        calibration_bins(log_probabilities, labels),
        robustness,
    )


def compute_metrics(
    log_probabilities: Tensor, labels: Tensor, disputed: Sequence[int] = (), classes: Sequence[str] = DIGITS
) -> dict[str, object]:
    """Return the loss (nats an image), the accuracy, overall and by class, the counts and the calibration error.

    `log_probabilities` are (N, classes), `labels` (N,) with at least one of each class. The undisputed accuracy leaves
    out the images at the indices `disputed`.
    """
    right = log_probabilities.argmax(dim=1) == labels
    total = score(log_probabilities, labels)
    undisputed = right.new_ones(len(right))
    undisputed[list(disputed)] = False
    return {
        "test_accuracy": total.accuracy,
        "test_undisputed_accuracy": right[undisputed].double().mean().item(),
        **{f"test_{name}": value for name, value in asdict(total).items()},
        "test_misclassified": total.total - total.correct,
        "test_calibration_error": calibration_error(calibration_bins(log_probabilities, labels)),
        "test_per_class_accuracy": {
            name: right[labels == label].double().mean().item() for label, name in enumerate(classes)
        },
    }


def calibration_bins(log_probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Return the number of images, mean confidence and accuracy of each bin of confidence that has images."""
    confidence, prediction = _probabilities(log_probabilities).max(dim=1)
    bins = (confidence * BIN_COUNT).ceil().clamp(1, BIN_COUNT)
    return [
        {
            "images": int((members := bins == number).sum()),
            "confidence": confidence[members].mean().item(),
            "accuracy": (prediction == labels)[members].double().mean().item(),
        }
        for number in bins.unique()  # sorted
    ]


def calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """Return the expected calibration error: the mean over images of |accuracy - confidence| in the image's bin."""
    images = sum(row["images"] for row in bins)
    return sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / images


def _measure_robustness(
    model: nn.Module, digits: Digits, normalization: Normalization, batch_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """Score the network on each corruption in turn, so that memory holds one corrupted copy at a time."""
    rows = []
    for corruption in tqdm(CORRUPTIONS, desc="Corrupting", unit="corruption", delay=2, leave=False, disable=None):
        images, labels = corruption.apply(digits).tensors(normalization, device)
        log_probabilities = predict(model, images, batch_size)
        total = score(log_probabilities, labels)
        error = calibration_error(calibration_bins(log_probabilities, labels))
        scores = dict(zip(SCORES, (total.accuracy, total.loss, error), strict=True))
        rows.append({"corruption": corruption.name, "family": corruption.family, **scores})
    return rows


def family_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean scores of each family of corruptions; the rows of a family must be adjacent."""
    families = {family: list(members) for family, members in groupby(rows, key=lambda row: row["family"])}
    return {
        family: {name: statistics.mean(row[name] for row in members) for name in SCORES}
        for family, members in families.items()
    }


def corrupted_accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean accuracy of each family of corruptions by metric name."""
    return {
        f"test_corrupted_{family.replace('-', '_')}_accuracy": means["accuracy"]
        for family, means in family_means(rows).items()
    }


def prediction_rows(log_probabilities: Tensor, labels: Tensor) -> list[dict[str, object]]:
    """Return a row for each image: its index in the test file, label, prediction and the prediction's probability."""
    found = zip(labels.tolist(), *(each.tolist() for each in _probabilities(log_probabilities).max(dim=1)), strict=True)
    return [
        {"index": index, "label": label, "prediction": prediction, "probability": f"{probability:.6f}"}
        for index, (label, probability, prediction) in enumerate(found)
    ]


def name_classes(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows of `prediction_rows` with the names of classes in place of their numbers."""
    return [{**row, **{column: classes[row[column]] for column in ("label", "prediction")}} for row in rows]


def _probabilities(log_probabilities: Tensor) -> Tensor:
    """Return the probabilities (N, classes) as doubles. The softmax is torch's own; `exp` would be MKL's."""
    return log_probabilities.double().softmax(dim=1)
