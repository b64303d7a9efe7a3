"""Measure what one training gains from several processes: the figures of docs/many-machines.md."""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from mnist_pipeline.common.params import Params
from mnist_pipeline.common.paths import RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.distributed.group import Group, train_in_group
from mnist_pipeline.training.distributed.launch import join_group
from mnist_pipeline.training.loop import TrainingLoop, start_training, train

ROUNDS = 3
SUMS = 200  # timed, for each size
_IMAGES = 10_000
_LAYOUTS = {"1 process of 1 thread": (1, 1), "2 processes of 1 thread": (2, 1), "1 process of 2 threads": (1, 2)}


def measure_processes_and_threads(params: Params) -> dict[str, Any]:
    """Return each layout's images a second, round by round, and the seconds of the sums of a group."""
    rates: dict[str, list[float]] = {layout: [] for layout in _LAYOUTS}
    for _ in tqdm(range(ROUNDS), desc="Processes and threads", disable=None):
        for layout, (processes, threads) in _LAYOUTS.items():
            changed = params.model_copy(update={"threads": threads})
            if processes == 1:
                rates[layout].append(_images_a_second(changed, set_up_torch(threads), train))
            else:
                rates[layout].append(_run_in_group(processes, _images_a_second_in_group, changed))
    found = {
        "images_a_second": rates,
        "seconds_of_a_sum": _run_in_group(2, _seconds_of_sums, params),
    }
    set_up_torch(params.threads)
    return found


def _run_in_group(processes: int, work: Callable[[Params], Any], params: Params) -> Any:
    """Run `work` in several processes, as torchrun does, and return the first one's result."""
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        return elastic_launch(config, work)(params)[0]


def _images_a_second_in_group(params: Params) -> float:
    with join_group(params.threads) as group:
        return _images_a_second(params, group.device, partial(train_in_group, group))


def _images_a_second(params: Params, device: torch.device, training_loop: TrainingLoop) -> float:
    """Train for two epochs and return the speed of the second."""
    digits = load_digits(RAW, "train")[:_IMAGES].tensors(params.data, device)
    two_epochs = params.train.model_copy(update={"epochs": 2})
    training = start_training(build_model(params.model, params.seed).to(device), two_epochs)
    epochs = training_loop(training, digits, (digits[0][:1], digits[1][:1]), two_epochs, params.seed)
    next(epochs)
    start = time.perf_counter()
    next(epochs)
    return len(digits[1]) / (time.perf_counter() - start)


def _seconds_of_sums(params: Params) -> dict[str, float]:
    """Return the median seconds in which a group sums all gradients, and the statistics of the widest normalisation."""
    sizes = {
        "gradient": sum(weights.numel() for weights in build_model(params.model, params.seed).parameters()),
        "statistics": 2 * max(params.model.model_dump()["channels"]),
    }
    with join_group(threads=1) as group:
        return {name: _seconds_of_a_sum(group, size) for name, size in sizes.items()}


def _seconds_of_a_sum(group: Group, size: int) -> float:
    values = torch.zeros(size, device=group.device)
    seconds = []
    for _ in range(SUMS):
        start = time.perf_counter()
        group.sum(values)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
