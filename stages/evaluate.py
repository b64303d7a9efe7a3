"""Test the trained network on the test images, plain and corrupted; write its metrics and predictions."""

from mnist_pipeline.common.errors import run
from mnist_pipeline.common.files import write_csv, write_json
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import CALIBRATION, METRICS, MODEL, PREDICTIONS, RAW, ROBUSTNESS
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.evaluation.disputed import disputed_images
from mnist_pipeline.evaluation.metrics import (
    calibration_bins,
    compute_metrics,
    corrupted_accuracies,
    measure_robustness,
    prediction_rows,
)
from mnist_pipeline.model.inference import predict, set_up_torch
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.model.network import count_parameters
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.store import Store, continue_untracked


def main() -> None:
    params = load_params()
    provenance = trace("evaluate")
    device = set_up_torch(params.threads)
    model = load_model(MODEL)
    network = model.network.to(device)
    digits = load_digits(RAW, "test")
    images, labels = digits.tensors(model.normalization, device)
    log_probabilities = predict(network, images, params.evaluate.batch_size)
    metrics = compute_metrics(log_probabilities, labels, disputed_images(digits))
    robustness = measure_robustness(network, digits, model.normalization, params.evaluate.batch_size, device)
    size = {"parameters": count_parameters(network), "model_bytes": MODEL.stat().st_size}
    write_csv(PREDICTIONS, prediction_rows(log_probabilities, labels))
    write_csv(CALIBRATION, calibration_bins(log_probabilities, labels))
    write_csv(ROBUSTNESS, robustness)
    write_json(METRICS, metrics | corrupted_accuracies(robustness) | size)
    print(f"Test set: Accuracy: {metrics['test_correct']}/{metrics['test_total']} ({metrics['test_accuracy']:.2%})")
    with continue_untracked("what evaluate found"):
        Store().add_to_run_of(MODEL, provenance, {"test": digits})


if __name__ == "__main__":
    run(main)
