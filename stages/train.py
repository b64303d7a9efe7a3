"""Train the network, and write its weights and the history of its epochs."""

import sys

sys.path.insert(0, "src")  # this directory's package: DVC runs experiments in copies of the repository

from mnist_pipeline.common.errors import run
from mnist_pipeline.common.files import write_csv
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.common.paths import ADDED, HISTORY, MODEL, RAW
from mnist_pipeline.data.training_set import load_training_data
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.model_file import save_model
from mnist_pipeline.tracking.progress import TrainingLog
from mnist_pipeline.tracking.provenance import identify_training, trace
from mnist_pipeline.tracking.training_run import training_run
from mnist_pipeline.training.checkpoint import Checkpoint
from mnist_pipeline.training.distributed.launch import launch
from mnist_pipeline.training.loop import TrainingLoop, train
from mnist_pipeline.training.rehearsal import prepare_training


def main(params: Params, train: TrainingLoop = train) -> None:
    provenance = trace("train", params)
    device = set_up_torch(params.threads)
    parts = load_training_data(RAW, ADDED, params.data, params.seed)
    digits, monitor = (part.tensors(params.data, device) for part in parts.values())
    training = prepare_training(digits, params.data, params.model, params.train, params.seed)
    checkpoint = Checkpoint(provenance.fingerprint)
    with training_run(provenance, parts, training.model, training.history, checkpoint.restore(training)) as tracked:
        log = TrainingLog(params.train, len(digits[1]), params.data.monitor_name, len(training.history) + 1)
        for result in log.follow(train(training, digits, monitor, params.train, params.seed, log.on_batch)):
            checkpoint.save(training, tracked.id)
            tracked.log_epoch(result)
        write_csv(HISTORY, [result.row() for result in training.history])
        save_model(training.network, MODEL, params.model, params.data)
        tracked.log_model(training.network, MODEL, example=monitor[0][:2])
    checkpoint.finish()


if __name__ == "__main__":
    run(lambda: launch(main, load_params(), identify_training))  # in `train.processes` processes
