"""Test the trained network, on corrupted images too, and write its metrics and its prediction for each test image."""

from mnist_pipeline.data import load_digits
from mnist_pipeline.errors import run
from mnist_pipeline.evaluation import calibration, corrupted_accuracies, measure, measure_robustness, predictions
from mnist_pipeline.files import write_csv, write_json
from mnist_pipeline.inference import predict, set_up_torch
from mnist_pipeline.model import count_parameters, load_model
from mnist_pipeline.params import load_params
from mnist_pipeline.paths import CALIBRATION, METRICS, MODEL, PREDICTIONS, RAW, ROBUSTNESS
from mnist_pipeline.provenance import trace
from mnist_pipeline.tracking import Store, tolerant


def main() -> None:
    params = load_params()
    provenance = trace("evaluate")
    device = set_up_torch(params.threads)
    model = load_model(MODEL).to(device)
    digits = load_digits(RAW, "test")
    images, labels = digits.tensors(params.data, device)
    log_probabilities = predict(model, images, params.evaluate.batch_size)
    metrics = measure(log_probabilities, labels, digits.disputed())
    robustness = measure_robustness(model, digits, params.data, params.evaluate.batch_size, device)
    size = {"parameters": count_parameters(model), "model_bytes": MODEL.stat().st_size}
    write_csv(PREDICTIONS, predictions(log_probabilities, labels))
    write_csv(CALIBRATION, calibration(log_probabilities, labels))
    write_csv(ROBUSTNESS, robustness)
    write_json(METRICS, metrics | corrupted_accuracies(robustness) | size)
    print(f"Test set: Accuracy: {metrics['test_correct']}/{metrics['test_total']} ({metrics['test_accuracy']:.2%})")
    with tolerant("what evaluate found"):
        Store().add_to_run_of(MODEL, provenance, {"test": digits})


if __name__ == "__main__":
    run(main)
