"""Train the network, in one process or in several, and write its weights and the history of its epochs."""

from mnist_pipeline.checkpoint import Checkpoint
from mnist_pipeline.console import TrainingLog
from mnist_pipeline.data import load_training_data
from mnist_pipeline.errors import run
from mnist_pipeline.files import write_csv
from mnist_pipeline.model import build_model, save_model
from mnist_pipeline.params import Params, load_params
from mnist_pipeline.paths import ADDED, HISTORY, MODEL, RAW
from mnist_pipeline.processes import agree, join, launch
from mnist_pipeline.provenance import trace
from mnist_pipeline.tracking import training_run
from mnist_pipeline.training import start_training, train


def work(params: Params) -> None:
    with join(params.threads) as group:
        provenance = agree(group, lambda: trace("train", params))
        parts = load_training_data(RAW, ADDED, params.data, params.seed)
        digits, monitor = (part.tensors(params.data, group.device) for part in parts.values())
        training = start_training(build_model(params.model, params.seed).to(group.device), params.train, group)
        checkpoint = Checkpoint(provenance.fingerprint)
        interrupted = checkpoint.restore(training)
        log = TrainingLog(params.train, len(digits[1]), params.data.monitor_name, len(training.history) + 1)
        if group.follows(epochs := train(training, digits, monitor, params.train, params.seed, log.on_batch)):
            return
        with training_run(provenance, parts, training, interrupted) as tracked:
            for result in epochs:
                checkpoint.save(training, tracked.id)
                tracked.log_epoch(result)
                log.on_epoch(result)
            write_csv(HISTORY, [result.row() for result in training.history])
            save_model(training.network, MODEL, params.model, params.data)
            tracked.log_model(training.network, MODEL, example=monitor[0][:2])
        checkpoint.remove()


if __name__ == "__main__":
    run(lambda: launch(work, load_params()))
