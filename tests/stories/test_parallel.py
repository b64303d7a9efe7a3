"""One training in several processes: the same curve as in one, through deaths, and on two hosts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from support import DATA
from support.repository import Repository, after_an_epoch

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import read_table
from mnist_pipeline.common.params import Params
from mnist_pipeline.tracking.provenance import identify_training
from mnist_pipeline.training.distributed.launch import Identify, launch

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]

TOLERANCE = 1e-3  # of a loss, relative: sums in another order, over some tens of steps
# 300 digits in batches of 23: the last one has a single image, so that some of four processes have none.
VARIED = {
    "batch_size": 23,
    "epochs": 3,
    "averaging": 0.9,
    "rotation": 10.0,
    "shift": 1.0,
    "clean_epochs": 1,
    "label_smoothing": 0.1,
}
TORCHRUN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def workspace(root: Path, **params: object) -> Repository:
    repository = Repository.create(root, **params)
    shutil.copytree(DATA, root / "data/raw")
    return repository


def history(repository: Repository) -> list[dict[str, str]]:
    return read_table(repository.root / "reports/history.csv")


def outputs(repository: Repository) -> list[bytes]:
    return [(repository.root / name).read_bytes() for name in ("models/model.safetensors", "reports/history.csv")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The history of a training in one process."""
    repository = workspace(tmp_path_factory.mktemp("alone"), **VARIED)
    assert repository.stage("train").returncode == 0
    return history(repository)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, str]:
    """A repository in which two processes have trained without trouble, and what they printed."""
    repository = workspace(tmp_path_factory.mktemp("pair"), processes=2, **VARIED)
    finished = repository.stage("train")
    assert finished.returncode == 0, finished.stdout
    return repository, finished.stdout


def assert_same_curve(found: list[dict[str, str]], alone: list[dict[str, str]]) -> None:
    for row, expected in zip(found, alone, strict=True):
        for name in ("train_loss", "monitor_loss"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=TOLERANCE), name
        # Up to one image in a hundred more or less: so early in a training many are nearly tied.
        for name in ("train_accuracy", "monitor_accuracy"):
            assert float(row[name]) == pytest.approx(float(expected[name]), abs=0.0101), name


def test_two_processes_give_the_curve_of_one(pair: tuple[Repository, str], alone: list[dict[str, str]]) -> None:
    repository, said = pair
    assert_same_curve(history(repository), alone)
    assert len(re.findall("^Epoch: ", said, re.MULTILINE)) == len(alone)  # one of them prints
    [run] = repository.runs()  # and tracks
    assert repository.steps(run) == [1, 2, 3]
    assert run.data.params["train.processes"] == "2"


def test_four_processes_give_the_curve_of_one(tmp_path: Path, alone: list[dict[str, str]]) -> None:
    repository = workspace(tmp_path, processes=4, **VARIED)
    finished = repository.stage("train")
    assert finished.returncode == 0, finished.stdout
    assert_same_curve(history(repository), alone)


def workers_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    if not children.exists():
        pytest.skip("the processes are found by Linux's /proc")
    found = children.read_text(encoding="utf-8").split()
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_is_started_again_and_the_run_is_the_same(
    tmp_path: Path, pair: tuple[Repository, str], victim: int
) -> None:
    repository = workspace(tmp_path, processes=2, **VARIED)
    process = repository.start(sys.executable, "stages/train.py")
    said = after_an_epoch(process, lambda: os.kill(workers_of(process.pid)[victim], signal.SIGKILL))
    assert process.returncode == 0, said
    assert "A process died: all start again, 1 of at most 3 times" in said
    assert "Going on after epoch" in said
    assert "Traceback" not in said
    assert outputs(repository) == outputs(pair[0])
    [run] = repository.runs()
    assert run.info.status == "FINISHED"
    assert repository.steps(run, "monitor_loss") == [1, 2, 3]
    assert list(tmp_path.glob(".checkpoints/*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_launcher(tmp_path: Path, number: signal.Signals) -> None:
    repository = workspace(tmp_path, processes=2, epochs=100, batch_size=32)
    process = repository.start(sys.executable, "stages/train.py")
    workers: list[int] = []

    def interrupt() -> None:
        workers.extend(workers_of(process.pid))
        process.send_signal(number)

    said = after_an_epoch(process, interrupt)  # ends when the last process that could write has ended
    assert process.returncode != 0
    assert "Traceback" not in said
    assert "death signal" not in said
    assert len(workers) == 2
    assert [run.info.status for run in repository.runs()] == ["KILLED"]


def test_a_mistake_of_all_processes_is_said_once(tmp_path: Path) -> None:
    repository = workspace(tmp_path, processes=2, optimizer="sgd", learning_rate=100, weight_decay=100)
    finished = repository.stage("train")
    assert finished.returncode == 1
    assert finished.stdout.count("error: epoch 1: the loss is not finite") == 1
    assert "Traceback" not in finished.stdout


def test_a_mistake_of_the_leading_process_alone_is_said_once(tmp_path: Path) -> None:
    repository = workspace(tmp_path, processes=2)
    finished = repository.stage("train", MNIST_TRACKING="required", MLFLOW_TRACKING_URI="http://localhost:1")
    assert finished.returncode == 1
    assert len(re.findall("^error: MLflow at http://localhost:1 failed", finished.stdout, re.MULTILINE)) == 1
    assert "Traceback" not in finished.stdout


def torchrun(repository: Repository, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return repository.run(*torchrun_command(*arguments), **TORCHRUN)


def torchrun_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "torchrun"), *arguments, "stages/train.py"]


def test_torchrun_must_start_as_many_processes_as_the_params_say(tmp_path: Path) -> None:
    finished = torchrun(workspace(tmp_path, processes=3), "--standalone", "--nproc-per-node=1")
    assert finished.returncode != 0
    assert "error: train.processes is 3, and torchrun started 1" in finished.stdout


def never(*arguments: object) -> NoReturn:
    raise AssertionError("they must not train")


def refusal(params: Params, processes: int) -> str:
    """Return why `launch` refuses to start the processes."""
    changed = params.model_copy(update={"train": params.train.model_copy(update={"processes": processes})})
    with pytest.raises(UserError) as refused:
        launch(never, changed, never)
    return str(refused.value)


@pytest.mark.parametrize("processes", [1, 3])
def test_machines_must_have_as_many_processes_each(
    params: Params, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    message = f"train.processes must be a multiple of PET_NNODES, and is {processes}"
    assert refusal(params, processes).startswith(message)


@pytest.mark.parametrize("endpoint", ["", "nowhere.invalid:29400", "192.0.2.1:29400", "localhost:port"])
def test_machines_must_be_told_where_they_meet(params: Params, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", endpoint)
    assert refusal(params, processes=2).startswith(
        f"PET_RDZV_ENDPOINT must be a host:port of this machine, where the others meet it, and is {endpoint!r}"
    )


def two_machines(root: Path) -> tuple[Repository, Repository]:
    """Return two repositories of the same commit."""
    first = workspace(root / "first", processes=2, **VARIED).init()
    shutil.copytree(first.root, root / "second")
    return first, Repository(root / "second")


def start_on_two(
    first: Repository,
    second: Repository,
    endpoint: str,
    restarts: int = 3,
    on: tuple[list[str], list[str]] = ([], []),
) -> tuple["subprocess.Popen[str]", "subprocess.Popen[str]"]:
    """Start the stage on the first machine, which drives, and torchrun on the second."""
    options = ["--nnodes=2", "--nproc-per-node=1", f"--max-restarts={restarts}"]
    options += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-conf=is_host=0"]
    variables = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": endpoint}
    driving = first.start(*on[0], sys.executable, "stages/train.py", **variables)
    return driving, second.start(*on[1], *torchrun_command(*options), **TORCHRUN)


def other_command(params: Params) -> dict[str, object]:
    return identify_training(params) | {"command": f"the one of process {os.environ['RANK']}"}


def other_lock_file(params: Params) -> dict[str, object]:
    if os.environ["RANK"] == "1":
        os.chdir(shutil.copytree(".", tempfile.mkdtemp(dir=".."), dirs_exist_ok=True))
        Path("requirements.lock").write_text("torch==0.1\n")
    return identify_training(params)


def without_images(params: Params) -> dict[str, object]:
    if os.environ["RANK"] == "1":
        os.chdir(tempfile.mkdtemp(dir="."))
        shutil.copy("../dvc.yaml", ".")
    return identify_training(params)


@pytest.mark.parametrize(
    ("identify", "message"),
    [
        (other_command, r"command is the one of process 1 in process 1, .* 0 in the leading one: make them equal"),
        (
            other_lock_file,
            r"requirements.lock is ([0-9a-f]{64}) in process 1, (?!\1)[0-9a-f]{64} in the leading one: make them equal",
        ),
        (without_images, r"data/added is absent: .* \(process 1\)"),
    ],
)
def test_a_worker_that_would_train_something_else_is_refused_and_all_are_told(
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    identify: Identify,
    message: str,
) -> None:
    monkeypatch.chdir(workspace(tmp_path).root)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # `launch` sets variables for its workers for good
    two = params.model_copy(update={"threads": 1, "train": params.train.model_copy(update={"processes": 2})})
    with pytest.raises(UserError, match=message):
        launch(never, two, identify)
    assert "warning: train.processes and threads make 2 threads on the 1 cores" in capsys.readouterr().err


def test_one_process_with_more_threads_than_cores_is_warned_of(
    params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    launch(lambda params: None, params.model_copy(update={"threads": 256}), lambda params: {})
    assert "warning: train.processes and threads make 256 threads on the 2 cores" in capsys.readouterr().err


def test_a_machine_with_other_params_is_refused_at_once_and_both_are_told(tmp_path: Path) -> None:
    first, second = two_machines(tmp_path)
    second.set_param("processes", 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    driving, other = start_on_two(first, second, endpoint)
    (said, _), (others, _) = driving.communicate(), other.communicate()
    assert time.monotonic() - began < 120, "they waited for one another"
    assert driving.returncode == 1
    assert other.returncode != 0
    assert said.startswith(f"Waiting at {endpoint} for machines: 1 more")
    for told in (said, others):
        assert re.search(r"error: train.processes is 1 in process \d, 2 in the leading one: make them equal", told)
    assert "Traceback" not in said


@contextmanager
def hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Give two hosts, 10.99.0.1 and 10.99.0.2, joined by a cable: what runs a command on each."""
    name = f"mnist{os.getpid()}"
    first, second = f"{name}a", f"{name}b"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    with ExitStack() as undo:
        try:
            for host in (first, second):
                ip("netns", "add", host)
                undo.callback(ip, "netns", "delete", host)
            ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for host, address in ((first, "10.99.0.1/24"), (second, "10.99.0.2/24")):
                ip("-netns", host, "address", "add", address, "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-netns", host, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine makes no network namespaces: {error}")
        yield ["ip", "netns", "exec", first], ["ip", "netns", "exec", second]


@pytest.mark.parametrize("driver", [0, 1])
def test_two_hosts_train_as_one_and_only_the_driving_one_writes(
    tmp_path: Path, alone: list[dict[str, str]], driver: int
) -> None:
    first, second = two_machines(tmp_path)
    with hosts() as on:
        # No resolver knows the name of such a host, so each says by which address the other reaches it.
        for number, command in enumerate(on, start=1):
            command.extend(["env", f"PET_LOCAL_ADDR=10.99.0.{number}", "GLOO_SOCKET_IFNAME=eth0"])
        endpoint = f"10.99.0.{driver + 1}:29400"
        driving, other = start_on_two(first, second, endpoint, on=(on[driver], on[1 - driver]))
        (said, _), (others, _) = driving.communicate(), other.communicate()
    assert driving.returncode == 0, said + others
    for found, expected in zip(history(first), alone, strict=True):
        assert float(found["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=TOLERANCE)
    assert not (second.root / "models").exists()
    assert second.client.get_experiment_by_name("mnist") is None
    assert "Epoch" not in others
    [run] = first.runs()
    assert json.loads(run.data.params["train.processes"]) == 2
