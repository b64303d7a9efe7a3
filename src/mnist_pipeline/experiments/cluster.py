"""Trials in a Ray cluster, each a task for one core. Ray is imported here alone, and only once a cluster is asked for.

On every machine `ray start` was called in the environment of a clone of this repository, from which its workers train.
"""

import hashlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.params import Params
from mnist_pipeline.common.paths import ADDED, CHECKPOINTS, PIPELINE, REQUIREMENTS
from mnist_pipeline.experiments.trial import GRACE, POLL, Point, Progress, Row, Trial, TrialError, run_trial
from mnist_pipeline.tracking.provenance import DATA, clean_environment, commit, digest, sha256_of_data

URI = "MLFLOW_TRACKING_URI"
PATIENCE = 5  # seconds to wait for an answer
# What a client of gRPC, which Ray speaks, says first, and the kind of frame with which a server answers (RFC 9113, 3.4)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = 4


@contextmanager
def connect(address: str) -> Generator[tuple[int, Callable[[Trial], Progress]]]:
    """Connect to the cluster at HOST:PORT; give its number of cores, and what runs a trial in it.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or MLflow is none that all its machines reach.
    """
    try:
        import ray
    except ImportError:
        raise UserError('--ray needs Ray, which is absent: `pip install --editable ".[cluster]"`') from None
    check_tracking()
    check_address(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    try:
        ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False)
        cores = int(ray.cluster_resources().get("CPU", 0))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"the Ray cluster at {address} cannot be used: {first_line(error)}") from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        if cores == 0:
            raise UserError(f"the Ray cluster at {address} has no cores: `ray start --address={address}` adds a node's")
        yield cores, partial(run_remotely, describe_repository(), sha256_of_images())
    finally:
        ray.shutdown()


def check_tracking() -> None:
    """Check that what the trials tell MLflow can come together.

    Raises:
        UserError: `MLFLOW_TRACKING_URI` names no server.
    """
    if urlsplit(uri := os.environ.get(URI, "")).scheme not in ("http", "https"):
        said = f"is {uri}" if uri else "is not set"
        raise UserError(f"with --ray, {URI} must name a server that all machines reach (http://HOST:5000), and {said}")


def check_address(address: str) -> None:
    """Check that a server of gRPC answers: Ray's own attempts to reach one take minutes, and end the process.

    Raises:
        UserError: none does.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--ray must be HOST:PORT of a cluster's head, as `ray start --head` says, and is {address!r}")
    try:
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.sendall(PREFACE)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}): `ray start --head` starts one") from None
    if answer[3:4] != bytes([SETTINGS]):
        raise UserError(f"what answers at {address} is no Ray cluster: `ray start --head` says where one is")


def run_remotely(repository: Mapping[str, str], images: str, trial: Trial) -> Progress:
    """Run a trial in the cluster as `run_trial` does here; where its node dies, once more.

    Raises:
        TrialError: a stage failed, or a second node died.
        UserError: a node cannot train the same.
    """
    from ray.exceptions import RayError, RayTaskError

    attempt = partial(run_task, repository, images, trial)
    try:
        yield from attempt()
    except RayTaskError as error:
        raise _as_user_error(trial, error) from None
    except RayError as error:
        print(f"{trial.name}: its node died ({type(error).__name__}), so it runs again", flush=True)
        try:
            yield from attempt()
        except RayTaskError as again:
            raise _as_user_error(trial, again) from None
        except RayError as again:
            raise TrialError(f"{trial.name}: a second node died under it ({type(again).__name__})") from None


def run_task(repository: Mapping[str, str], images: str, trial: Trial) -> Progress:
    """Run a trial as a task of Ray; to close the generator cancels it.

    Raises:
        RayError: the task failed (`RayTaskError`), or its node.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=0)(train_here)
    plain = vars(trial) | {"params": trial.params.model_dump()}  # a worker of other code could not read more
    steps: Any = remote.remote(plain, repository, images, passed_on())
    try:
        while True:
            if not ray.wait([steps], timeout=POLL)[0]:
                yield None
                continue
            try:
                step = ray.get(next(steps))
            except StopIteration:
                return
            yield step if isinstance(step, dict) else Point(*step)
    finally:
        ray.cancel(steps)
        ray.wait([steps.completed()], timeout=GRACE)


def _as_user_error(trial: Trial, error: Any) -> UserError:
    """Return what went wrong in a worker as an error of ours."""
    cause = error.cause
    return cause if isinstance(cause, UserError) else UserError(f"{trial.name}: {first_line(cause)}")


def first_line(error: BaseException) -> str:
    """Say in a line what an error is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def passed_on() -> dict[str, str]:
    """Return the variables that a training needs on another machine."""
    return {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "MNIST_TRACKING"))}


# What a worker does


def train_here(
    plain: dict[str, Any], repository: Mapping[str, str], images: str, variables: Mapping[str, str]
) -> Generator[tuple[float, ...] | Row]:
    """Run a trial in the repository that this package lies in, if it is the same as the driver's.

    Yield its points, as plain tuples, and its row.

    Raises:
        UserError: it is not, lacks data, or cannot reach MLflow; or the trial failed.
    """
    from ray.util import get_node_ip_address

    os.chdir(Path(__file__).parents[2])
    node = f"node {get_node_ip_address()} ({Path.cwd()})"
    check_repository(node, repository)
    check_server(node, variables[URI])
    bring_data(node, images)
    trial = Trial(**plain | {"params": Params.model_validate(plain["params"])})
    with closing(run_trial(trial, clean_environment() | dict(variables))) as progress:
        for step in progress:
            if step:
                yield step if isinstance(step, dict) else tuple(step)


def describe_repository() -> dict[str, str]:
    """Return what two machines must have in common besides params and data to train the same."""
    files = [PIPELINE, *sorted(file for directory in ("src", "stages") for file in Path(directory).rglob("*.py"))]
    listed = "".join(f"{sha256(file)}  {file.as_posix()}\n" for file in files)
    return {
        "commit": commit()["git_commit"],
        "code's SHA-256": hashlib.sha256(listed.encode()).hexdigest(),
        f"{REQUIREMENTS}'s SHA-256": sha256(REQUIREMENTS) if REQUIREMENTS.exists() else "none: it is absent",
    }


def check_repository(node: str, expected: Mapping[str, str]) -> None:
    """Check that this repository is the same as the driver's.

    Raises:
        UserError: it is not.
    """
    found = describe_repository()
    if differences := [
        f"its {what} is {found.get(what)}, the driver's {value}"
        for what, value in expected.items()
        if found.get(what) != value
    ]:
        raise UserError(f"{node} is refused: {'; '.join(differences)}: give both the same commit, and `make setup`")


def check_server(node: str, uri: str) -> None:
    """Check that MLflow's server can be reached from this machine.

    Raises:
        UserError: it cannot.
    """
    parts = urlsplit(uri)
    try:
        socket.create_connection((parts.hostname, parts.port or socket.getservbyname(parts.scheme)), PATIENCE).close()
    except OSError as error:
        where = f"{parts.scheme}://{parts.hostname}"  # without the password that the address may have
        raise UserError(
            f"{node} does not reach MLflow at {where} ({error}): {URI} must name one that it does"
        ) from None


def bring_data(node: str, expected: str) -> None:
    """Bring the images, where they are not those that the driver has, from DVC's remote.

    Raises:
        UserError: they are not to be had.
    """
    CHECKPOINTS.mkdir(exist_ok=True)
    with FileLock(CHECKPOINTS / "data.lock"):  # DVC refuses to run twice at once
        if sha256_of_images() == expected:
            return
        added = sorted(map(str, ADDED.glob("*.dvc")))
        command = [sys.executable, "-m", "dvc", "pull", "--quiet", "download", *added]
        pull = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if pull.returncode != 0:
            lines: Sequence[str] = [line for line in pull.stdout.splitlines() if line.startswith("ERROR")]
            why = (lines or pull.stdout.splitlines() or [f"exit code {pull.returncode}"])[0]
            raise UserError(f"{node} lacks the data, and `dvc pull` failed ({why}): `dvc push` where they are")
        if (found := sha256_of_images()) != expected:
            raise UserError(f"{node} is refused: its data's SHA-256 is {found}, the driver's {expected}")


def sha256_of_images() -> str:
    """Return the digest of all images that train, empty where there are none."""
    try:
        return sha256_of_data({str(path): digest(path) for path in DATA})
    except UserError:
        return ""
