"""Test the trained network on the test images, plain and corrupted; write its metrics and predictions."""

import sys

sys.path.insert(0, "src")  # this directory's package: DVC runs experiments in copies of the repository

from mnist_pipeline.common.errors import run
from mnist_pipeline.common.files import write_csv, write_json
from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import CALIBRATION, METRICS, MODEL, PREDICTIONS, RAW, ROBUSTNESS, checkpoint_path
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.evaluation.metrics import evaluate, name_classes
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.store import Store, continue_untracked


def main() -> None:
    params = load_params()
    provenance = trace("evaluate")
    device = set_up_torch(params.threads)
    model = load_model(MODEL)
    digits = load_digits(RAW, "test", len(model.classes))
    evaluation = evaluate(model, digits, params.evaluate.batch_size, device)
    write_csv(PREDICTIONS, name_classes(evaluation.predictions, model.classes))
    write_csv(CALIBRATION, evaluation.calibration)
    write_csv(ROBUSTNESS, evaluation.robustness)
    write_json(METRICS, evaluation.metrics | {"model_bytes": MODEL.stat().st_size})
    print("Test set: Accuracy: {test_correct}/{test_total} ({test_accuracy:.2%})".format_map(evaluation.metrics))
    checkpoint_path(trace("train").fingerprint).unlink(missing_ok=True)  # DVC has the model: see `Checkpoint.finish`
    with continue_untracked("what evaluate found"):
        Store().add_to_run_of(MODEL, provenance, {"test": digits})


if __name__ == "__main__":
    run(main)
