"""A real `mlflow server` on loopback, and functions that wait for servers and processes."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server

import mlflow
import pytest


def free_port() -> int:
    with create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server that was started meets a condition; if it ends or takes too long, fail with its log."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@dataclass
class Server:
    """An `mlflow server` on loopback, with any database, and its artifacts in a directory."""

    directory: Path
    database: str
    port: int = field(default_factory=free_port)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def start(self) -> None:
        """Start it in its own process group, because it has children."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        switched_off = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        where = {"--host": "127.0.0.1", "--port": str(self.port), "--workers": "1"}
        stores = {"--backend-store-uri": self.database, "--artifacts-destination": str(self.directory / "artifacts")}
        options = [word for option in (where | stores).items() for word in option]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options],
                cwd=self.directory,
                env=kept | switched_off,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it serves."""
        wait_until(self.healthy, self.process, self.log)

    def healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it is dead
            self.send(signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(directory: Path, database: str) -> Iterator[Server]:
    server = Server(directory, database)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def say_until(process: "subprocess.Popen[str]", pattern: str) -> str:
    """Return what a process prints, up to a line that matches."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(said)


def say_rest(process: "subprocess.Popen[str]") -> str:
    """Return what a process prints from here to its end."""
    said, _ = process.communicate()
    return said


@pytest.fixture
def mlflow_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Give a function that points MLflow in this process to a server, for one test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # restored at the end
    yield mlflow.set_tracking_uri
    mlflow.set_tracking_uri(None)
