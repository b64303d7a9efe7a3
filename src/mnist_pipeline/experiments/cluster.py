"""Trials in a Ray cluster, one for each core. Only this module imports Ray, and only when a cluster is asked for.

Every machine runs `ray start` in the environment of its own clone of this repository; its trials train in that clone.
"""

import logging
import os
import re
import signal
import socket
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import params_type
from mnist_pipeline.experiments.node import ANSWER_SECONDS, identify_images, identify_repository, prepare_node
from mnist_pipeline.experiments.trial import (
    GRACE_SECONDS,
    POLL_SECONDS,
    EpochScore,
    RunTrial,
    StudyRow,
    Trial,
    TrialError,
    TrialProgress,
    run_trial,
)
from mnist_pipeline.tracking.address import TRACKING_URI, show_address
from mnist_pipeline.tracking.provenance import clean_environment

# Ray speaks gRPC: what a gRPC client sends first, and the kind of frame that a server answers with (RFC 9113, 3.4).
_CLIENT_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS_FRAME = bytes([4])


@contextmanager
def connect_cluster(address: str) -> Generator[tuple[int, RunTrial]]:
    """Connect to the cluster whose head is HOST:PORT; yield its number of cores and the function that runs a trial.

    Raises:
        UserError: Ray is not installed, no usable cluster answers, or MLflow is no server that all machines reach.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray, which is absent: `make cluster` installs it") from None
    _check_tracking()
    _check_address(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray replaces it
    try:
        ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False)
        cores = int(ray.cluster_resources().get("CPU", 0))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"the Ray cluster at {address} cannot be used: {_first_line(error)}") from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        if cores == 0:
            raise UserError(f"the Ray cluster at {address} has no cores: `ray start --address={address}` adds a node")
        yield cores, partial(_run_in_cluster, identify_repository(), identify_images())
    finally:
        ray.shutdown()


def _check_tracking() -> None:
    uri = os.environ.get(TRACKING_URI, "")
    if not re.fullmatch(r"https?://[\w.:\[\]-]+", shown := show_address(uri)):
        found = f"is {shown}" if uri else "is not set"
        raise UserError(
            f"with --ray, {TRACKING_URI} must name a server that all machines reach (http://HOST:5000), and {found}"
        )


def _check_address(address: str) -> None:
    """Check that a gRPC server answers: if none does, Ray itself tries for minutes and then ends this process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--ray must be HOST:PORT, as `ray start --head` prints it, and is {address!r}")
    try:
        with socket.create_connection((host, int(port)), ANSWER_SECONDS) as connection:
            connection.sendall(_CLIENT_PREFACE)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}): `ray start --head` starts one") from None
    if answer[3:4] != _SETTINGS_FRAME:
        raise UserError(f"what answers at {address} is no Ray cluster: `ray start --head` prints a cluster's address")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _run_in_cluster(repository: Mapping[str, str], images: str, trial: Trial) -> TrialProgress:
    """Run a trial in the cluster, as `run_trial` does here. If its node dies, run it once more on another."""
    from ray.exceptions import RayError, RayTaskError

    for attempt in (1, 2):
        try:
            yield from _run_task(repository, images, trial)
            return
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, UserError) else UserError(f"{trial.name}: {_first_line(cause)}") from None
        except RayError as error:
            died = type(error).__name__
            if attempt == 2:
                raise TrialError(f"{trial.name}: its second node died too ({died})") from None
            print(f"{trial.name}: its node died ({died}), so it runs again", flush=True)


def _run_task(repository: Mapping[str, str], images: str, trial: Trial) -> TrialProgress:
    import ray

    task = ray.remote(num_cpus=1, max_retries=0)(_train_on_node)
    fields = vars(trial) | {"params": trial.params.model_dump()}  # builtin types: a node with other code can read them
    tracking = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "MNIST_TRACKING"))}
    steps: Any = task.remote(fields, repository, images, tracking)
    try:
        while True:
            if not ray.wait([steps], timeout=POLL_SECONDS)[0]:
                yield None
                continue
            try:
                step = ray.get(next(steps))
            except StopIteration:
                return
            yield step if isinstance(step, dict) else EpochScore(*step)
    finally:
        ray.cancel(steps)
        ray.wait([steps.completed()], timeout=GRACE_SECONDS)


def _train_on_node(
    fields: dict[str, Any], repository: Mapping[str, str], images: str, tracking: Mapping[str, str]
) -> Generator[tuple[float, ...] | StudyRow]:
    """Run a trial on a machine of the cluster, in the clone that this module lies in; yield its scores and its row."""
    from ray.util import get_node_ip_address

    os.chdir(Path(__file__).parents[3])
    prepare_node(f"node {get_node_ip_address()} ({Path.cwd()})", repository, images, tracking[TRACKING_URI])
    trial = Trial(**fields | {"params": params_type(fields["params"]).model_validate(fields["params"])})
    with closing(run_trial(trial, clean_environment() | dict(tracking))) as progress:
        for step in progress:
            if step:
                yield step if isinstance(step, dict) else tuple(step)
