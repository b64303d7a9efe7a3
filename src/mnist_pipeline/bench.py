"""What an epoch costs beside the plain loop, what tracking adds, and the memory of a training (`make bench`)."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

from mnist_pipeline.data import load_digits, load_training_data
from mnist_pipeline.errors import UserError
from mnist_pipeline.files import write_json
from mnist_pipeline.inference import set_up_torch
from mnist_pipeline.model import build_model
from mnist_pipeline.params import Params, load_params
from mnist_pipeline.paths import ADDED, BENCH, MODEL, PARAMS, RAW
from mnist_pipeline.provenance import clean_environment
from mnist_pipeline.training import start_training, train

ROUNDS = 3
FEW = 1000  # images, so that what is not training shows


def main() -> None:
    """Time both loops in turn, A B A B, then trainings with and without tracking, and take a training's memory."""
    params = load_params()
    device = set_up_torch(params.threads)
    loops: dict[str, Callable[[Params, torch.device], None]] = {"pipeline": pipeline_epoch, "plain": plain_epoch}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in tqdm(range(ROUNDS), desc="Epochs of both loops", disable=None):
        for name, epoch in loops.items():
            start = time.perf_counter()
            epoch(params, device)
            seconds[name].append(time.perf_counter() - start)
    ratios = [ours / plain for ours, plain in zip(seconds["pipeline"], seconds["plain"], strict=True)]
    ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    tracking = seconds_of_tracking()
    share = statistics.median(tracking) / (params.train.epochs * statistics.median(seconds["pipeline"]))
    memory = peak_memory_of_training(params)
    write_json(
        BENCH,
        {
            "epoch_seconds": seconds,
            "ratio": ratio,
            "tracking_seconds": tracking,
            "tracking_share": share,
            "train_peak_memory_mb": memory,
        },
    )
    print(f"An epoch takes {ratio['median']:.2f} of the plain loop's time")
    print(f"Tracking and checkpoints add {share:.1%} to a training; the train stage peaks at {memory:.0f} MB")


def pipeline_epoch(params: Params, device: torch.device) -> None:
    """Load the data, train one epoch and score the test images with this project's loop."""
    training, test = (load_digits(RAW, part).tensors(params.data, device) for part in ("train", "test"))
    model = build_model(params.model, params.seed).to(device)
    one_epoch = params.train.model_copy(update={"epochs": 1})
    list(train(start_training(model, one_epoch), training, test, one_epoch, params.seed))


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
    from mnist_pipeline.checkpoint import Checkpoint
    from mnist_pipeline.provenance import trace
    from mnist_pipeline.tracking import training_run

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
