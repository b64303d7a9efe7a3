"""Train as the train stage does, on few images; `--untracked` leaves out MLflow and checkpoints."""

import sys

from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import ADDED, MODEL, RAW
from mnist_pipeline.data.training_set import load_training_data
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.loop import start_training, train

_IMAGES = 1000  # so few that tracking takes a visible share of the time


def main(tracked: bool) -> None:
    """Train. If tracked, save a checkpoint and log to MLflow after each epoch, and log the model file in models/."""
    params = load_params()
    device = set_up_torch(params.threads)
    datasets = load_training_data(RAW, ADDED, params.data, params.seed)
    datasets = {use: digits[:_IMAGES] for use, digits in datasets.items()}
    digits, monitor = (each.tensors(params.data, device) for each in datasets.values())
    training = start_training(build_model(params.model, params.seed).to(device), params.train)
    epochs = train(training, digits, monitor, params.train, params.seed)
    if not tracked:
        list(epochs)
        return
    # Importing MLflow is part of the cost of tracking.
    from mnist_pipeline.tracking.provenance import trace
    from mnist_pipeline.tracking.training_run import training_run
    from mnist_pipeline.training.checkpoint import Checkpoint

    provenance = trace("train")
    checkpoint = Checkpoint(provenance.fingerprint)
    with training_run(provenance, datasets, training.model, training.history, interrupted=None) as run:
        for result in epochs:
            checkpoint.save(training, run.id)
            run.log_epoch(result)
        run.log_model(training.network, MODEL, example=monitor[0][:2])


if __name__ == "__main__":
    main(tracked="--untracked" not in sys.argv)
