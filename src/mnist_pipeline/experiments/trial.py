"""One training of a study or a sweep: the pipeline's stages as they are, in a temporary copy of the pipeline.

Its checkpoint and its MLflow run lie where those of the repository do, so a killed trial goes on where it was.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_csv, read_text, write_text
from mnist_pipeline.common.params import Params
from mnist_pipeline.common.paths import ADDED, HISTORY, METRICS, PARAMS, PIPELINE, RAW
from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.report.studies import MEASURES
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.store import PARENT
from mnist_pipeline.training.checkpoint import Checkpoint

VALIDATION_SIZE = 5000  # training images held out, on which choices are made
POLL = 0.5  # seconds between two looks at a training
GRACE = 60  # seconds that a training has to end when told to: MLflow may take half of them


class TrialError(UserError):
    """A trial failed by itself; others may do well."""


@dataclass(frozen=True)
class Trial:
    """What to run: stages with params, under a name and as a part of a run of MLflow."""

    name: str
    params: Params
    stages: Sequence[str]
    parent: str | None


class Point(NamedTuple):
    """An epoch's scores on the images that monitor the training."""

    epoch: int
    accuracy: float
    loss: float

    @classmethod
    def of(cls, result: EpochResult) -> "Point":
        """Take the scores from an epoch's result."""
        return cls(result.epoch, result.monitor.accuracy, result.monitor.loss)


Row = dict[str, str]  # what a trial measured, as a study's table holds it
Progress = Generator[Point | Row | None]  # a point for each epoch, None while there is none, at last the row


def alone(params: Params) -> Params:
    """Return the params of a training that takes one core: others run beside it."""
    return params.model_copy(update={"threads": 1, "train": params.train.model_copy(update={"processes": 1})})


def run_trial(trial: Trial, environment: Mapping[str, str] | None = None) -> Progress:
    """Run a trial and yield the points of its curve as they appear, None at least every `POLL` seconds, then its row.

    To close the generator stops the training, whose checkpoint stays and whose run in MLflow says that it was killed.

    Raises:
        TrialError: a stage failed.
    """
    checkpoint = Checkpoint(trace("train", trial.params).fingerprint)
    environment = os.environ if environment is None else environment
    with tempfile.TemporaryDirectory() as temporary, lock_of(checkpoint.path) as lock:
        while not acquire(lock):
            yield None
            time.sleep(POLL)
        copy = Path(temporary)
        copy_pipeline(copy, trial.params)
        root = environment.get("DVC_ROOT", str(Path.cwd()))
        variables = {**environment, "PYTHONPATH": "src", "DVC_ROOT": root, "DVC_EXP_NAME": trial.name}
        start = time.monotonic()
        seen = 0
        for stage in trial.stages:
            process = subprocess.Popen(
                [sys.executable, f"stages/{stage}.py"],
                cwd=copy,
                env=variables | ({PARENT: trial.parent} if trial.parent else {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                process_group=0,  # Ctrl-C is for us: we stop it
                pass_fds=[lock.fileno()],
            )
            try:
                while (said := output_of(process)) is None:
                    points = [Point.of(result) for result in checkpoint.history()[seen:]]
                    yield from points
                    seen += len(points)
                    yield None
            finally:
                stop(process)
            if process.returncode != 0:
                lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
                raise TrialError(f"{trial.name}: {stage} failed: {lines[-1]}")
        seconds = time.monotonic() - start
        curve = [
            Point(int(row["epoch"]), row["monitor_accuracy"], row["monitor_loss"]) for row in read_csv(copy / HISTORY)
        ]
        yield from curve[seen:]
        found: dict[str, Any] = {"seed": trial.params.seed, "epochs": trial.params.train.epochs}
        found |= {"seconds": round(seconds, 1), "monitor_accuracy": curve[-1].accuracy, "monitor_loss": curve[-1].loss}
        if "evaluate" in trial.stages:
            metrics = json.loads(read_text(copy / METRICS))
            found |= {measure: metrics[measure] for measure in MEASURES}
        yield {name: str(value) for name, value in found.items()}


def copy_pipeline(copy: Path, params: Params) -> None:
    """Lay out the pipeline as it is in a directory, with other params."""
    # With its history, where it has one, so that the run can say how it differs from the commit.
    subprocess.run(["git", "clone", "--quiet", "--shared", ".", str(copy)], capture_output=True, check=False)
    for directory in ("src", "stages", ADDED):
        shutil.rmtree(copy / directory, ignore_errors=True)
        shutil.copytree(directory, copy / directory)
    shutil.copy(PIPELINE, copy)
    (copy / RAW).symlink_to(RAW.resolve())
    write_text(copy / PARAMS, yaml.safe_dump(params.model_dump(), sort_keys=False))


def output_of(process: "subprocess.Popen[str]") -> str | None:
    """Return what a process said once it has ended, None if it goes on for `POLL` seconds more."""
    try:
        return process.communicate(timeout=POLL)[0]
    except subprocess.TimeoutExpired:
        return None


def stop(process: "subprocess.Popen[str]") -> None:
    """End a process, if it runs: politely, so that it can say so in MLflow."""
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextmanager
def lock_of(checkpoint: Path) -> Generator[IO[str]]:
    """Open the file by which no two processes train the same at once, and remove it in the end.

    A stage inherits it. So the training that a killed study left behind keeps it until, at the end of the epoch, it
    finds that nobody listens any more.
    """
    path = checkpoint.with_suffix(".lock")
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        try:
            yield lock
        finally:
            if acquire(lock):
                path.unlink(missing_ok=True)


def acquire(lock: IO[str]) -> bool:
    """Take a lock and say whether that went well; else another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
