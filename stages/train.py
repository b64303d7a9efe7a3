"""Train the network and write its weights and the history of its epochs."""

from mnist_pipeline.console import TrainingLog
from mnist_pipeline.data import load_training_data
from mnist_pipeline.errors import run
from mnist_pipeline.files import write_csv
from mnist_pipeline.inference import set_up_torch
from mnist_pipeline.model import build_model, count_parameters, save_model
from mnist_pipeline.params import load_params
from mnist_pipeline.paths import HISTORY, MODEL, RAW
from mnist_pipeline.tracking import training_run
from mnist_pipeline.training import train


def main() -> None:
    params = load_params()
    device = set_up_torch(params.threads)
    model = build_model(params.model, params.seed).to(device)
    digits = load_training_data(RAW, params.data, params.seed)
    training, monitor = (part.tensors(params.data, device) for part in digits)
    settings = dict(seed=params.seed, threads=params.threads, data=params.data, model=params.model, train=params.train)
    log = TrainingLog(params.train, len(training[1]), params.data.monitor_name)
    with training_run(settings, RAW, count_parameters(model)) as tracked:
        history = []
        for result in train(model, training, monitor, params.train, params.seed, log.on_batch):
            log.on_epoch(result)
            tracked.log_epoch(result)
            history.append(result)
        write_csv(HISTORY, [result.row() for result in history])
        save_model(model, MODEL, params.model, params.data)
        tracked.log_model(model, MODEL, example=monitor[0][:2])


if __name__ == "__main__":
    run(main)
