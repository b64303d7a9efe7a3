"""What `--ray` asks for before it connects: each mistake is one line, soon. `test_ray.py` has the real cluster."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socket import create_server
from types import ModuleType

import pytest
from support.servers import free_port

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params
from mnist_pipeline.experiments import cluster
from mnist_pipeline.experiments.cluster import connect_cluster
from mnist_pipeline.experiments.trial import EpochScore, Trial, TrialError, TrialProgress


@pytest.fixture(autouse=True)
def _ray_and_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.2)


@contextmanager
def server_that_says(answer: bytes) -> Iterator[str]:
    """Give the address of a server that answers its first client with these bytes; without any, it only listens."""
    with create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            with client:
                client.sendall(answer)
                client.recv(100)

        if answer:
            threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def refusal(address: str) -> str:
    with pytest.raises(UserError) as error, connect_cluster(address):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_address_must_be_a_host_and_a_port() -> None:
    assert refusal("auto") == "--ray must be HOST:PORT, as `ray start --head` prints it, and is 'auto'"


def test_a_cluster_that_does_not_answer_is_an_error() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert refusal(address).startswith(f"no Ray cluster answers at {address} (")
    with server_that_says(b"") as address:
        assert refusal(address).startswith(f"no Ray cluster answers at {address} (timed out")


def test_a_server_of_another_kind_is_an_error() -> None:
    with server_that_says(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert f"what answers at {address} is no Ray cluster" in refusal(address)


@pytest.mark.parametrize(("uri", "found"), [(None, "is not set"), ("sqlite:///mlflow.db", "is sqlite:///mlflow.db")])
def test_mlflow_must_be_a_server(uri: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if uri is None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    message = refusal("127.0.0.1:6379")
    assert "MLFLOW_TRACKING_URI must name a server that all machines reach" in message
    assert message.endswith(found)


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal("127.0.0.1:6379") == "--ray needs Ray, which is absent: `make cluster` installs it"


def test_a_trial_whose_node_dies_runs_once_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], params: Params
) -> None:
    ray_errors = ModuleType("ray.exceptions")
    ray_errors.RayError = type("RayError", (Exception,), {})  # type: ignore[attr-defined]
    ray_errors.RayTaskError = type("RayTaskError", (ray_errors.RayError,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray_errors)
    attempts = []

    def run_task(*arguments: object) -> TrialProgress:
        attempts.append(arguments)
        yield EpochScore(1, 0.5, 1.0)
        raise ray_errors.RayError

    monkeypatch.setattr(cluster, "_run_task", run_task)
    trial = Trial("best-0", params, ["train"], None)
    with pytest.raises(TrialError, match="best-0: its second node died too"):
        list(cluster._run_in_cluster({}, "", trial))
    assert len(attempts) == 2
    assert "best-0: its node died (RayError), so it runs again" in capsys.readouterr().out
