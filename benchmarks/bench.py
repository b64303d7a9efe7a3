"""Measure what training, testing and the pipeline around them cost: `python -m benchmarks.bench [PART...]`."""

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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.scaling import measure_processes_and_threads
from benchmarks.tracking_stores import measure_tracking_stores
from mnist_pipeline.common.errors import UserError, run
from mnist_pipeline.common.files import read_text, write_json
from mnist_pipeline.common.kernels import SETTINGS
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.common.paths import BENCH, PARAMS, RAW
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.experiments.recipes import find_recipe
from mnist_pipeline.model.inference import predict, set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.tracking.provenance import clean_environment
from mnist_pipeline.training.loop import start_training, train

ROUNDS = 3
RECIPES = ["specification", "fast"]  # trained to the end
STAGES = ["download", "train", "evaluate", "report"]
_GROWTH_IMAGES = 10_000
# Nothing but the kernels differs: the settings go before torch reads them, all but those that are for speed alone.
_EPOCH_WITH_FREE_KERNELS = """
import os, sys
from mnist_pipeline.common.kernels import SETTINGS
for name in SETTINGS.keys() - {"GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"}:
    del os.environ[name]
from benchmarks.one_epoch import main
main("train")
"""


def measure(chosen: Sequence[str] = ()) -> None:
    """Measure the chosen parts, or all, and write them to reports/bench.json, beside the parts measured earlier.

    What is compared runs in turn (A B A B), and the file holds the seconds of each round.

    Raises:
        UserError: there is no such part, or a file that a part needs is absent.
    """
    params = load_params()
    device = set_up_torch(params.threads)
    parts: dict[str, Callable[[], Any]] = {
        "epoch_seconds": _epoch_seconds,
        "trainings": lambda: {name: _whole_training(name, device) for name in RECIPES},
        "test_images_a_second": lambda: _test_images_a_second(params, device),
        "growth": lambda: _growth(params, device),
        "floor": lambda: _floor(params, device),
        "pipeline_seconds": lambda: _time_in_turn("The pipeline's own overhead", _overheads()),
        "tracking_seconds": _seconds_of_tracking,
        "train_peak_memory_mb": lambda: _peak_memory_of_training(params),
        "scaling": lambda: measure_processes_and_threads(params),
        "stores": measure_tracking_stores,
    }
    if unknown := [name for name in chosen if name not in parts]:
        raise UserError(f"{unknown[0]} is not a part of the bench: choose from {', '.join(parts)}")
    earlier = json.loads(read_text(BENCH)) if chosen else {}
    write_json(BENCH, {**earlier, **{name: parts[name]() for name in chosen or parts}})
    print(f"{BENCH} is written: `make readme` copies its figures into README.md and docs")


def _time_in_turn(title: str, commands: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Run the commands in turn, `ROUNDS` times; return each command's seconds, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in tqdm(range(ROUNDS), desc=title, disable=None):
        for name, command in commands.items():
            start = time.perf_counter()
            command()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _change_training(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"train": params.train.model_copy(update=changes)})


def _epoch_seconds() -> dict[str, list[float]]:
    """Return the seconds of an epoch and of an evaluation, each in a new process.

    The epochs: the pipeline's, the pipeline's with the best kernels that the processor has, and the plain loop's.
    """
    as_users_have_it = {name: value for name, value in clean_environment().items() if name not in SETTINGS}
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "MNIST").mkdir()
        (Path(root) / "MNIST" / "raw").symlink_to(RAW.resolve())  # where torchvision looks
        commands = {
            "pipeline": ([sys.executable, "-m", "benchmarks.one_epoch", "train"], clean_environment()),
            "free kernels": ([sys.executable, "-c", _EPOCH_WITH_FREE_KERNELS], clean_environment()),
            "plain": ([sys.executable, "benchmarks/plain_loop.py", root], as_users_have_it),
            "evaluate": ([sys.executable, "-m", "benchmarks.one_epoch", "evaluate"], clean_environment()),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in tqdm(range(ROUNDS), desc="Epochs", disable=None):
            for name, (command, environment) in commands.items():
                printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
                seconds[name].append(float(printed))
    return seconds


def _whole_training(recipe: str, device: torch.device) -> dict[str, Any]:
    """Train a recipe to its end; return the seconds and the test accuracy after each epoch."""
    params = load_params(overlay=find_recipe(recipe))
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


def _test_images_a_second(params: Params, device: torch.device) -> float:
    """Return how many test images the network reads in a second, in the best of `ROUNDS` rounds."""
    images, _ = load_digits(RAW, "test").tensors(params.data, device)
    model = build_model(params.model, params.seed).to(device)
    seconds = _time_in_turn("Testing", {"test": lambda: predict(model, images, params.evaluate.batch_size)})["test"]
    return len(images) / min(seconds)


def _growth(params: Params, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the seconds of an epoch as the number of images, the batch size and the network's widths change."""

    def seconds(images: int = _GROWTH_IMAGES, batch_size: int = params.train.batch_size, widths: float = 1) -> float:
        model_params = params.model.model_copy(
            update={"channels": [round(widths * channels) for channels in params.model.model_dump()["channels"]]}
        )
        one_epoch = _change_training(params, epochs=1, batch_size=batch_size).train
        digits = load_digits(RAW, "train")[:images].tensors(params.data, device)
        model = build_model(model_params.model_copy(update={"parameter_budget": 1_000_000}), params.seed).to(device)
        training = start_training(model, one_epoch)
        start = time.perf_counter()
        list(train(training, digits, (digits[0][:1], digits[1][:1]), one_epoch, params.seed))
        return time.perf_counter() - start

    seconds(1000)  # warms up
    return {
        "images": {
            f"{images:,}": seconds(images) for images in (_GROWTH_IMAGES // 4, _GROWTH_IMAGES // 2, _GROWTH_IMAGES)
        },
        "batch": {str(size): seconds(batch_size=size) for size in (32, 64, 128, 256, 512)},
        "widths": {f"×{widths:g}": seconds(widths=widths) for widths in (0.5, 1, 2, 4)},
    }


def _floor(params: Params, device: torch.device) -> dict[str, float]:
    """Return the operations of an epoch, and the operations a second when the processor multiplies large matrices.

    An operation is an addition or a multiplication; a backward pass counts as torch counts it.
    """
    batch = torch.zeros(params.train.batch_size, 1, 28, 28, device=device)
    model = build_model(params.model, params.seed).to(device)
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    matrix = torch.ones(2048, 2048, device=device)
    seconds = _time_in_turn("Multiplying", {"product": lambda: matrix.matmul(matrix).sum().item()})["product"]
    images = len(load_digits(RAW, "train"))
    return {
        "epoch_operations": counter.get_total_flops() / len(batch) * images,
        "operations_a_second": 2 * len(matrix) ** 3 / min(seconds),
    }


def _overheads() -> dict[str, Callable[[], object]]:
    """Return commands: start each stage but do none of its work, and run `dvc repro` with nothing to do."""

    def launch(*command: str) -> Callable[[], object]:
        environment = clean_environment() | {"PYTHONPATH": "src"}
        return lambda: subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)

    start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='started')"  # everything but `main`
    return {
        **{stage: launch(sys.executable, "-c", start, f"stages/{stage}.py") for stage in STAGES},
        "dvc repro": launch("dvc", "repro", "--quiet"),
    }


def _seconds_of_tracking() -> list[float]:
    """Train on few images with tracking and checkpoints and without, in turn; return the differences.

    Each training is a process of its own with a new database: importing MLflow and making the tables counts, too.
    """
    differences = []
    for _ in tqdm(range(ROUNDS), desc="Trainings with and without tracking", disable=None):
        seconds = []
        for options in ([], ["--untracked"]):
            with tempfile.TemporaryDirectory() as root:
                start = time.perf_counter()
                command = [sys.executable, "-m", "benchmarks.tracked_training", *options]
                subprocess.run(command, env=clean_environment() | {"DVC_ROOT": root}, check=True)
                seconds.append(time.perf_counter() - start)
        differences.append(seconds[0] - seconds[1])
    return differences


def _peak_memory_of_training(params: Params) -> float:
    """Run the train stage for one epoch in a temporary copy; return its largest resident memory in MB (10⁶)."""
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


if __name__ == "__main__":
    run(lambda: measure(sys.argv[1:]))
