"""One training of a study or a sweep: the pipeline's own stages, run in a temporary copy of the pipeline.

The copy uses the checkpoints and the MLflow store of the repository, so a killed trial resumes where it stopped.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import lock_descriptor

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_csv, read_text, sha256, write_json
from mnist_pipeline.common.params import Params
from mnist_pipeline.common.paths import ADDED, HISTORY, METRICS, MODEL, PARAMS, PIPELINE, RAW
from mnist_pipeline.report.studies import MEASURES
from mnist_pipeline.tracking.git import GitError, clone_repository
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.store import PARENT_RUN
from mnist_pipeline.training.checkpoint import Checkpoint

VALIDATION_SIZE = 10_000  # training images held out to score trials on: one of MNIST's six folds
POLL_SECONDS = 0.5
GRACE_SECONDS = 60  # for a training to end after SIGTERM: MLflow may take half of them


class TrialError(UserError):
    """A trial failed; other trials may still succeed."""


@dataclass(frozen=True)
class Trial:
    """The stages to run, their params, the trial's name, and the id of the MLflow run that it belongs to.

    On this machine a trial can leave its model in a file, `model`.
    """

    name: str
    params: Params
    stages: Sequence[str]
    parent: str | None
    model: Path | None = None


class EpochScore(NamedTuple):
    """The accuracy and loss after an epoch, on the images that monitor the training."""

    epoch: int
    accuracy: float
    loss: float


StudyRow = dict[str, str]  # what a trial measured: one row of a study's table
TrialProgress = Generator[EpochScore | StudyRow | None]  # a score for each epoch, None in between, and the row last
RunTrial = Callable[[Trial], TrialProgress]  # what this machine and a cluster each offer


def on_one_core(params: Params) -> Params:
    """Limit a training to one process of one thread, because other trainings run beside it."""
    return params.model_copy(update={"threads": 1, "train": params.train.model_copy(update={"processes": 1})})


def run_trial(trial: Trial, environment: Mapping[str, str] | None = None) -> TrialProgress:
    """Run a trial on this machine. Yield each epoch's score, None at least every `POLL_SECONDS`, and the row last.

    Closing the generator stops the training. Its checkpoint stays, and its MLflow run ends as killed.

    Raises:
        TrialError: a stage failed.
    """
    checkpoint = Checkpoint(trace("train", trial.params).fingerprint)
    path = checkpoint.path.with_suffix(".lock")
    with (yield from _open_lock(path)) as lock:
        try:
            yield from _run_stages(trial, os.environ if environment is None else environment, checkpoint, lock)
        finally:
            path.unlink(missing_ok=True)


def _run_stages(trial: Trial, environment: Mapping[str, str], checkpoint: Checkpoint, lock: IO[str]) -> TrialProgress:
    with tempfile.TemporaryDirectory() as temporary:
        copy = _copy_pipeline(Path(temporary), trial.params)
        variables = {"DVC_ROOT": str(Path.cwd()), **environment, "DVC_EXP_NAME": trial.name}
        variables |= {PARENT_RUN: trial.parent} if trial.parent else {}
        start = time.monotonic()
        seen = 0
        for stage in trial.stages:
            with closing(_run_stage(stage, trial.name, copy, variables, lock)) as running:
                for _ in running:
                    scores = [_epoch_score(result.row()) for result in checkpoint.history()[seen:]]
                    yield from scores
                    seen += len(scores)
                    yield None
        seconds = time.monotonic() - start
        curve = [_epoch_score(row) for row in read_csv(copy / HISTORY)]
        yield from curve[seen:]
        row: dict[str, Any] = {"seed": trial.params.seed, "epochs": trial.params.train.epochs}
        row |= {"seconds": round(seconds, 1), "monitor_accuracy": curve[-1].accuracy, "monitor_loss": curve[-1].loss}
        if "evaluate" in trial.stages:
            metrics = json.loads(read_text(copy / METRICS))
            row |= {measure: metrics[measure] for measure in MEASURES}
        row["model_sha256"] = sha256(copy / MODEL)
        if trial.model:
            shutil.copy(copy / MODEL, trial.model)
        try:
            yield {name: str(value) for name, value in row.items()}
        finally:
            checkpoint.remove()


def _epoch_score(row: Mapping[str, float]) -> EpochScore:
    return EpochScore(int(row["epoch"]), row["monitor_accuracy"], row["monitor_loss"])


def _copy_pipeline(copy: Path, params: Params) -> Path:
    """Copy the pipeline, with uncommitted changes, into a directory and set other params there; return its place."""
    with suppress(GitError):  # the history too, if there is one: the MLflow run records how the code differs from it
        copy = clone_repository(copy, "--shared")
    for directory in ("src", "stages", ADDED):
        shutil.rmtree(copy / directory, ignore_errors=True)
        shutil.copytree(directory, copy / directory)
    shutil.copy(PIPELINE, copy)
    (copy / RAW).symlink_to(RAW.resolve())
    write_json(copy / PARAMS, params.model_dump())  # JSON is YAML
    return copy


def _run_stage(stage: str, name: str, copy: Path, variables: Mapping[str, str], lock: IO[str]) -> Generator[None]:
    """Run a stage to its end and yield every `POLL_SECONDS`. Closing the generator ends the process."""
    process = subprocess.Popen(
        [sys.executable, f"stages/{stage}.py"],
        cwd=copy,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        process_group=0,  # Ctrl-C must not reach it: this process stops it
        pass_fds=[lock.fileno()],
    )
    try:
        while (output := _output_if_ended(process, POLL_SECONDS)) is None:
            yield
    finally:
        if process.poll() is None:
            process.terminate()  # SIGTERM lets it close its MLflow run
            if _output_if_ended(process, GRACE_SECONDS) is None:
                process.kill()
                process.communicate()
    if process.returncode != 0:
        lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
        raise TrialError(f"{name}: {stage} failed: {lines[-1]}")


def _output_if_ended(process: "subprocess.Popen[str]", seconds: float) -> str | None:
    """Return all output of a process if it ends within so many seconds, else None."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return None


def _open_lock(path: Path) -> Generator[None, None, IO[str]]:
    """Open the lock file that keeps two processes from the same training; yield while another process has it.

    Who has the lock removes the file at the end. A lock on a removed file is worth nothing: others lock a new one.

    Stages inherit the open file. A training that outlives its killed study therefore holds the lock until the end of
    the epoch, when it notices that nobody reads its output.
    """
    path.parent.mkdir(exist_ok=True)
    while True:
        lock = path.open("w")
        with suppress(FileNotFoundError):  # removed
            if lock_descriptor(lock.fileno(), blocking=False) and os.path.samefile(lock.fileno(), path):
                return lock
        lock.close()
        yield
        time.sleep(POLL_SECONDS)
