"""Do in a new process what the bench times, and print the seconds: `python -m benchmarks.one_epoch train|evaluate`."""

import sys
import time

from mnist_pipeline.common.params import load_params
from mnist_pipeline.common.paths import RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.evaluation.metrics import evaluate
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.model_file import TrainedModel
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.loop import start_training, train


def main(task: str) -> None:
    """Train for one epoch and score the test images, or do what the stage evaluate does; reading the files counts."""
    start = time.perf_counter()
    params = load_params()
    device = set_up_torch(params.threads)
    model = build_model(params.model, params.seed).to(device)
    if task == "train":
        training, test = (load_digits(RAW, part).tensors(params.data, device) for part in ("train", "test"))
        one_epoch = params.train.model_copy(update={"epochs": 1})
        list(train(start_training(model, one_epoch), training, test, one_epoch, params.seed))
    else:
        evaluate(TrainedModel(model, params.data), load_digits(RAW, "test"), params.evaluate.batch_size, device)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1])
