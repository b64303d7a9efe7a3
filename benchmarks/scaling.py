"""What one training gains from several processes (`make bench`): the figures behind docs/scaling.md."""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mnist_pipeline.common.files import read_text, write_text
from mnist_pipeline.common.params import Params
from mnist_pipeline.common.paths import RAW
from mnist_pipeline.data.digits import SIDE, load_digits
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.distributed.group import BatchNorm, Dropout, Group
from mnist_pipeline.training.distributed.launch import join, launch
from mnist_pipeline.training.loop import start_training, train

ROUNDS = 3
SOME = 10_000  # images
SUMS = 200  # of a kind, whose median counts
STEPS = 20  # of a kind, likewise
LAYOUTS = {"1 process of 1 thread": (1, 1), "2 processes of 1 thread": (2, 1), "1 process of 2 threads": (1, 2)}


def processes_and_threads(params: Params) -> dict[str, Any]:
    """Return the images a second of a training in each layout, round by round, and the seconds of a sum in two."""
    found: dict[str, Any] = {"images_a_second": {layout: [] for layout in LAYOUTS}}
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "seconds"
        for _ in tqdm(range(ROUNDS), desc="Processes and threads", disable=None):
            for layout, (processes, threads) in LAYOUTS.items():
                changed = params.model_copy(
                    update={"threads": threads, "train": params.train.model_copy(update={"processes": processes})}
                )
                launch(partial(train_some, report), changed)
                found["images_a_second"][layout].append(SOME / float(read_text(report)))
        changed = params.model_copy(update={"threads": 1, "train": params.train.model_copy(update={"processes": 2})})
        launch(partial(sum_often, report), changed)
        gradient, statistic = map(float, read_text(report).split())
    found["seconds_of_a_sum"] = {"gradient": gradient, "statistics": statistic}
    found["seconds_of_a_step"] = dict(zip(("alone", "in a group"), seconds_of_a_step(params), strict=True))
    set_up_torch(params.threads)
    return found


def train_some(report: Path, params: Params) -> None:
    """Train on some images for two epochs, as a process of a group, and report the seconds of the second."""
    with join(params.threads) as group:
        digits = load_digits(RAW, "train")[:SOME].tensors(params.data, group.device)
        two_epochs = params.train.model_copy(update={"epochs": 2})
        training = start_training(build_model(params.model, params.seed).to(group.device), two_epochs, group)
        epochs = train(training, digits, (digits[0][:1], digits[1][:1]), two_epochs, params.seed)
        next(epochs)
        start = time.perf_counter()
        next(epochs)
        if group.leads:
            write_text(report, str(time.perf_counter() - start))


def sum_often(report: Path, params: Params) -> None:
    """Report how long a group takes to add up all gradients, and the statistics of the widest normalisation."""
    with join(params.threads) as group:
        sizes = (
            sum(weights.numel() for weights in build_model(params.model, 0).parameters()),
            2 * max(params.model.channels),
        )
        medians = [median_seconds(group, torch.zeros(size, device=group.device)) for size in sizes]
        if group.leads:
            write_text(report, " ".join(map(str, medians)))


def seconds_of_a_step(params: Params) -> list[float]:
    """Return the median time of a forward and backward pass on one thread, with torch's layers and with a group's."""
    device = set_up_torch(threads=1)
    group = Group()
    batch = group.share(torch.zeros(params.train.batch_size, 1, SIDE, SIDE, device=device))
    models = [build_model(params.model, params.seed).to(device).train() for _ in range(2)]
    for name, layer in list(models[1].named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            models[1].set_submodule(name, BatchNorm(layer, group))
        elif isinstance(layer, nn.Dropout | nn.Dropout2d):
            models[1].set_submodule(name, Dropout(layer, group))
    seconds: list[list[float]] = [[], []]
    for _ in range(STEPS):
        for model, found in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(batch).sum().backward()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def median_seconds(group: Group, values: torch.Tensor) -> float:
    """Return the median time of a sum over a group's processes."""
    seconds = []
    for _ in range(SUMS):
        start = time.perf_counter()
        group.sum(values)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
