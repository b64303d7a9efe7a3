"""What training, testing and the pipeline around them cost, side by side (`make bench`)."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from mnist_pipeline.BENCH.scaling import processes_and_threads
from mnist_pipeline.tracking.throughput import tracking_stores
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms
from tqdm import tqdm

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_text, write_json
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.common.paths import ADDED, BENCH, MODEL, PARAMS, RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.data.training_set import load_training_data
from mnist_pipeline.experiments.recipes import overlay_of
from mnist_pipeline.model.inference import predict, set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.tracking.provenance import clean_environment
from mnist_pipeline.training.loop import start_training, train

ROUNDS = 3
FEW = 1000  # images, so that what is not training shows
SOME = 10_000  # images, over which to see how cost grows
COMPARED = ["specification", "fast"]  # recipes, of which a whole training is timed
STAGES = ["download", "train", "evaluate", "report"]


def main(chosen: Sequence[str] = ()) -> None:
    """Measure all parts, or some, what is compared in turn, A B A B, and write the seconds as they were.

    Raises:
        UserError: there is no such part, or a part needs what is absent.
    """
    params = load_params()
    device = set_up_torch(params.threads)
    loops: dict[str, Callable[[], object]] = {
        "pipeline": lambda: pipeline_epoch(params, device),
        "pipeline in bfloat16": lambda: pipeline_epoch(with_train(params, precision="bfloat16"), device),
        "eager": lambda: eager_epoch(params, device),
        "plain": lambda: plain_epoch(params, device),
    }
    parts: dict[str, Callable[[], Any]] = {
        "epoch_seconds": lambda: in_turn("Epochs of all loops", loops),
        "trainings": lambda: {name: whole_training(load_params(overlay=overlay_of(name)), device) for name in COMPARED},
        "test_images_a_second": lambda: test_throughput(params, device),
        "growth": lambda: growth(params, device),
        "floor": lambda: floor(params, device),
        "pipeline_seconds": lambda: in_turn("The pipeline's own overhead", overheads()),
        "tracking_seconds": seconds_of_tracking,
        "train_peak_memory_mb": lambda: peak_memory_of_training(params),
        "scaling": lambda: processes_and_threads(params),
        "stores": tracking_stores,
    }
    if unknown := [name for name in chosen if name not in parts]:
        raise UserError(f"{unknown[0]} is no part of the bench: choose from {', '.join(parts)}")
    kept = json.loads(read_text(BENCH)) if chosen else {}
    write_json(BENCH, {**kept, **{name: parts[name]() for name in chosen or parts}})
    print(f"{BENCH} is written: `make readme` carries it into the README")


def in_turn(title: str, commands: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return the seconds of each command, run in turn as many times as there are rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in tqdm(range(ROUNDS), desc=title, disable=None):
        for name, command in commands.items():
            start = time.perf_counter()
            command()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def with_train(params: Params, **changes: object) -> Params:
    """Return the params with other values in their section `train`."""
    return params.model_copy(update={"train": params.train.model_copy(update=changes)})


def pipeline_epoch(params: Params, device: torch.device) -> None:
    """Load the data, train one epoch and score the test images with this project's loop."""
    training, test = (load_digits(RAW, part).tensors(params.data, device) for part in ("train", "test"))
    model = build_model(params.model, params.seed).to(device)
    one_epoch = params.train.model_copy(update={"epochs": 1})
    list(train(start_training(model, one_epoch), training, test, one_epoch, params.seed))


def eager_epoch(params: Params, device: torch.device) -> None:
    """Do the same with nothing but torch: whole tensors, the optimizer, a mean of batch means."""
    (images, labels), test = (load_digits(RAW, part).tensors(params.data, device) for part in ("train", "test"))
    model = build_model(params.model, params.seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), params.train.learning_rate, weight_decay=params.train.weight_decay)
    model.train()
    for batch in torch.randperm(len(images)).split(params.train.batch_size):
        optimizer.zero_grad()
        F.nll_loss(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    predict(model, test[0], params.evaluate.batch_size)


def plain_epoch(params: Params, device: torch.device) -> None:
    """Do the same the plain way: a DataLoader that applies torchvision's transforms image by image."""
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((params.data.mean,), (params.data.std,))]
    )
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "MNIST").mkdir()
        (Path(root) / "MNIST" / "raw").symlink_to(RAW.resolve())  # where torchvision looks
        training, test = (datasets.MNIST(root, train=part, transform=transform) for part in (True, False))
    model = build_model(params.model, params.seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), params.train.learning_rate, weight_decay=params.train.weight_decay)
    model.train()
    for images, labels in DataLoader(training, params.train.batch_size, shuffle=True):
        optimizer.zero_grad()
        F.nll_loss(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for images, labels in DataLoader(test, params.evaluate.batch_size):
            F.nll_loss(model(images.to(device)), labels.to(device), reduction="sum").item()


def whole_training(params: Params, device: torch.device) -> dict[str, Any]:
    """Train by a recipe to its end; return the seconds and the test accuracy after each epoch."""
    training, test = (load_digits(RAW, part).tensors(params.data, device) for part in ("train", "test"))
    start = time.perf_counter()
    run = start_training(build_model(params.model, params.seed).to(device), params.train)
    epochs = [
        {"seconds": time.perf_counter() - start, "accuracy": result.monitor.accuracy}
        for result in tqdm(
            train(run, training, test, params.train, params.seed), desc="Whole trainings", leave=False, disable=None
        )
    ]
    return {"seconds": epochs[-1]["seconds"], "epochs": epochs}


def test_throughput(params: Params, device: torch.device) -> float:
    """Return how many test images pass through the network in a second, the best of several times."""
    images, _ = load_digits(RAW, "test").tensors(params.data, device)
    model = build_model(params.model, params.seed).to(device)
    seconds = in_turn("Testing", {"test": lambda: predict(model, images, params.evaluate.batch_size)})["test"]
    return len(images) / min(seconds)


def growth(params: Params, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the seconds of an epoch on some images, and on others, with other batches and other widths."""

    def seconds(images: int = SOME, batch_size: int = params.train.batch_size, widths: float = 1) -> float:
        model_params = params.model.model_copy(
            update={"channels": [round(widths * channels) for channels in params.model.channels]}
        )
        one_epoch = with_train(params, epochs=1, batch_size=batch_size).train
        digits = load_digits(RAW, "train")[:images].tensors(params.data, device)
        model = build_model(model_params.model_copy(update={"parameter_budget": 1_000_000}), params.seed).to(device)
        training = start_training(model, one_epoch)
        start = time.perf_counter()
        list(train(training, digits, (digits[0][:1], digits[1][:1]), one_epoch, params.seed))
        return time.perf_counter() - start

    seconds(FEW)  # warms up
    return {
        "images": {f"{images:,}": seconds(images) for images in (SOME // 4, SOME // 2, SOME)},
        "batch": {str(size): seconds(batch_size=size) for size in (32, 64, 128, 256, 512)},
        "widths": {f"×{widths:g}": seconds(widths=widths) for widths in (0.5, 1, 2, 4)},
    }


def floor(params: Params, device: torch.device) -> dict[str, float]:
    """Return the arithmetic of an epoch and how fast the processor multiplies large matrices, in operations a second.

    An operation is an addition or a multiplication; a backward pass counts as torch counts it.
    """
    batch = torch.zeros(params.train.batch_size, 1, 28, 28, device=device)
    model = build_model(params.model, params.seed).to(device)
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    matrix = torch.ones(2048, 2048, device=device)
    seconds = in_turn("Multiplying", {"product": lambda: matrix.matmul(matrix).sum().item()})["product"]
    images = len(load_digits(RAW, "train"))
    return {
        "epoch_operations": counter.get_total_flops() / len(batch) * images,
        "operations_a_second": 2 * len(matrix) ** 3 / min(seconds),
    }


def overheads() -> dict[str, Callable[[], object]]:
    """Return what surrounds a training, to be timed: the start-up of each stage, and a repro with nothing to do."""

    def run(*command: str) -> Callable[[], object]:
        environment = clean_environment() | {"PYTHONPATH": "src"}
        return lambda: subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)

    imported = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='imported')"  # all that comes before `main`
    return {
        **{stage: run(sys.executable, "-c", imported, f"stages/{stage}.py") for stage in STAGES},
        "dvc repro": run("dvc", "repro", "--quiet"),
    }


def seconds_of_tracking() -> list[float]:
    """Run trainings of few images with tracking and checkpoints and without, in turn; return the differences.

    Each is a process of its own with a new database: to import MLflow and to make the tables counts.
    """
    differences = []
    for _ in tqdm(range(ROUNDS), desc="Trainings with tracking and without", disable=None):
        seconds = []
        for tracked in (True, False):
            with tempfile.TemporaryDirectory() as root:
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-c", f"from mnist_pipeline.bench import train_on_few as f; f({tracked})"],
                    env=clean_environment() | {"DVC_ROOT": root},
                    check=True,
                )
                seconds.append(time.perf_counter() - start)
        differences.append(seconds[0] - seconds[1])
    return differences


def train_on_few(tracked: bool) -> None:
    """Do what the train stage does, on few images; the model that it logs is the one that is there."""
    params = load_params()
    device = set_up_torch(params.threads)
    parts = {use: part[:FEW] for use, part in load_training_data(RAW, ADDED, params.data, params.seed).items()}
    digits, monitor = (part.tensors(params.data, device) for part in parts.values())
    training = start_training(build_model(params.model, params.seed).to(device), params.train)
    epochs = train(training, digits, monitor, params.train, params.seed)
    if not tracked:
        list(epochs)
        return
    from mnist_pipeline.tracking.provenance import trace
    from mnist_pipeline.tracking.training_run import training_run
    from mnist_pipeline.training.checkpoint import Checkpoint

    provenance = trace("train")
    checkpoint = Checkpoint(provenance.fingerprint)
    with training_run(provenance, parts, training, None) as run:
        for result in epochs:
            checkpoint.save(training, run.id)
            run.log_epoch(result)
        run.log_model(training.model, MODEL, example=monitor[0][:2])


def peak_memory_of_training(params: Params) -> float:
    """Run the train stage for one epoch in a temporary directory; return its largest resident memory in MB (10⁶)."""
    with tempfile.TemporaryDirectory() as root:
        unneeded = shutil.ignore_patterns(".*", "mlflow.db", "mlartifacts")
        shutil.copytree(".", root, ignore=unneeded, dirs_exist_ok=True)
        shortened = params.model_dump()
        shortened["train"]["epochs"] = 1
        (Path(root) / PARAMS).write_text(yaml.safe_dump(shortened), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "stages/train.py"],
            cwd=root,
            env=clean_environment() | {"PYTHONPATH": "src"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise UserError("the train stage failed: run `dvc repro train` to see why")
    # Linux counts in KiB, macOS in bytes (getrusage(2)).
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
