"""The metrics of a few rows of log-probabilities, computed by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.evaluation.corruptions import CORRUPTIONS
from mnist_pipeline.evaluation.metrics import (
    calibration_bins,
    calibration_error,
    compute_metrics,
    corrupted_accuracies,
    evaluate,
    family_means,
    prediction_rows,
)
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import TrainedModel
from mnist_pipeline.model.network import build_model

LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 3])
PREDICTIONS = [0, 1, 2, 3, 9, 5, 6, 7, 8, 9, 3, 5]  # a 4 is taken for a 9, the last 3 for a 5


@pytest.fixture
def log_probabilities() -> Tensor:
    """0.91 for the prediction, 0.01 for each other class."""
    probabilities = torch.full((len(LABELS), 10), 0.01)
    probabilities[range(len(LABELS)), PREDICTIONS] = 0.91
    return probabilities.log()


def test_images_are_counted_once_each(log_probabilities: Tensor) -> None:
    metrics = compute_metrics(log_probabilities, LABELS)
    assert (metrics["test_correct"], metrics["test_misclassified"], metrics["test_total"]) == (10, 2, 12)
    assert metrics["test_accuracy"] == pytest.approx(10 / 12)
    assert metrics["test_loss"] == pytest.approx(-(10 * math.log(0.91) + 2 * math.log(0.01)) / 12)


def test_the_name_of_every_metric_begins_with_test(log_probabilities: Tensor) -> None:
    metrics = compute_metrics(log_probabilities, LABELS)
    assert [name for name in metrics if not name.startswith("test_")] == []


def test_accuracy_by_class_divides_by_the_images_of_the_class(log_probabilities: Tensor) -> None:
    by_class = compute_metrics(log_probabilities, LABELS)["test_per_class_accuracy"]
    assert by_class == pytest.approx({str(digit): 1.0 for digit in range(10)} | {"3": 2 / 3, "4": 0.0})


@pytest.mark.parametrize(
    ("disputed", "accuracy"), [((), 10 / 12), ((4,), 10 / 11), ((4, 11), 1), ((0, 1), 8 / 10), ((0, 4), 9 / 10)]
)
def test_only_the_undisputed_accuracy_leaves_disputed_images_out(
    log_probabilities: Tensor, disputed: tuple[int, ...], accuracy: float
) -> None:
    metrics = compute_metrics(log_probabilities, LABELS, disputed)
    assert metrics["test_undisputed_accuracy"] == pytest.approx(accuracy)
    others = {name: value for name, value in metrics.items() if name != "test_undisputed_accuracy"}
    assert others == {
        name: value for name, value in compute_metrics(log_probabilities, LABELS).items() if name in others
    }


def sure(*confidences: float) -> Tensor:
    """Predict 0 with these probabilities, and nothing else as probably."""
    return torch.tensor([[sure, *[(1 - sure) / 9] * 9] for sure in confidences], dtype=torch.float64).log()


def test_the_calibration_has_a_row_for_each_bin_that_has_images() -> None:
    labels = torch.tensor([0, 0, 1, 0, 1])
    rows = calibration_bins(sure(0.98, 0.5, 0.96, 0.94, 0.12), labels)
    assert rows == [
        {"images": 1, "confidence": pytest.approx(0.12), "accuracy": 0},
        {"images": 1, "confidence": pytest.approx(0.5), "accuracy": 1},
        {"images": 3, "confidence": pytest.approx(0.96), "accuracy": pytest.approx(2 / 3)},
    ]


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    log_probabilities, labels = sure(0.98, 0.5, 0.96, 0.94, 0.12), torch.tensor([0, 0, 1, 0, 1])
    error = (1 * 0.12 + 1 * 0.5 + 3 * (0.96 - 2 / 3)) / 5
    assert calibration_error(calibration_bins(log_probabilities, labels)) == pytest.approx(error)


def test_the_calibration_error_is_among_the_metrics(log_probabilities: Tensor) -> None:
    metrics = compute_metrics(log_probabilities, LABELS)
    assert metrics["test_calibration_error"] == pytest.approx(0.91 - 10 / 12)  # all are in one bin


def test_a_bin_includes_its_upper_end_and_excludes_its_lower_one() -> None:
    rows = calibration_bins(sure(0.59, 0.6, 0.601, 0.66), torch.zeros(4, dtype=torch.int64))
    assert [row["images"] for row in rows] == [2, 2]  # 8/15 to 9/15, and on to 10/15


@pytest.mark.parametrize("right", [True, False])
def test_a_probability_of_one_is_in_the_last_bin(right: bool) -> None:
    rows = calibration_bins(sure(1.0, 0.99), torch.tensor([0, 0]) if right else torch.tensor([1, 1]))
    assert rows == [{"images": 2, "confidence": pytest.approx(0.995), "accuracy": right}]


def test_a_network_is_scored_on_the_test_images_and_under_each_corruption(small_data: Path, params: Params) -> None:
    network, device, digits = build_model(params.model, seed=0), torch.device("cpu"), load_digits(small_data, "test")
    found = evaluate(TrainedModel(network, params.data), digits, 64, device)
    log_probabilities = predict(network, digits.tensors(params.data, device)[0], 64)
    metrics = compute_metrics(log_probabilities, digits.labels) | corrupted_accuracies(found.robustness)
    assert found.metrics == metrics | {"parameters": 19_210}
    assert found.predictions == prediction_rows(log_probabilities, digits.labels)
    assert found.calibration == calibration_bins(log_probabilities, digits.labels)
    for row, corruption in zip(found.robustness, CORRUPTIONS, strict=True):
        assert (row["corruption"], row["family"]) == (corruption.name, corruption.family)
        images, labels = corruption.apply(digits).tensors(params.data, device)
        metrics = compute_metrics(predict(network, images, 64), labels)
        scores = ("accuracy", "loss", "calibration_error")
        assert [row[score] for score in scores] == [metrics[f"test_{score}"] for score in scores]
    assert len({row["loss"] for row in found.robustness}) == len(CORRUPTIONS)


def test_the_scores_of_a_familys_corruptions_are_averaged() -> None:
    rows = [
        {"corruption": "a", "family": "geometric", "accuracy": 0.9, "loss": 0.1, "calibration_error": 0.02},
        {"corruption": "b", "family": "geometric", "accuracy": 0.6, "loss": 0.7, "calibration_error": 0.04},
        {"corruption": "c", "family": "non-geometric", "accuracy": 0.5, "loss": 1.5, "calibration_error": 0.3},
    ]
    assert family_means(rows) == {
        "geometric": pytest.approx({"accuracy": 0.75, "loss": 0.4, "calibration_error": 0.03}),
        "non-geometric": {"accuracy": 0.5, "loss": 1.5, "calibration_error": 0.3},
    }
    assert corrupted_accuracies(rows) == {
        "test_corrupted_geometric_accuracy": pytest.approx(0.75),
        "test_corrupted_non_geometric_accuracy": 0.5,
    }


def test_each_image_has_a_row_in_file_order(log_probabilities: Tensor) -> None:
    rows = prediction_rows(log_probabilities, LABELS)
    assert [row["index"] for row in rows] == list(range(12))
    assert [row["label"] for row in rows] == LABELS.tolist()
    assert [row["prediction"] for row in rows] == PREDICTIONS


def test_a_row_carries_the_probability_of_its_prediction(log_probabilities: Tensor) -> None:
    assert prediction_rows(log_probabilities, LABELS)[4] == {
        "index": 4,
        "label": 4,
        "prediction": 9,
        "probability": "0.910000",
    }
