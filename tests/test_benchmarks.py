"""The bench still measures each of its parts, and the pages can carry what it writes."""

import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import bench, scaling, tracking_stores
from benchmarks.pages import renew
from support import ROOT
from support.repository import Repository, empty_database

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params
from mnist_pipeline.common.paths import BENCH

PARTS = [
    "epoch_seconds",
    "floor",
    "growth",
    "pipeline_seconds",
    "scaling",
    "stores",
    "test_images_a_second",
    "tracking_seconds",
    "trainings",
]
EARLIER = {"train_peak_memory_mb": 1234.5}  # the one part that has to start the train stage
MARKED = "".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in ("bench", "processes", "stores"))


@pytest.fixture
def repository(trained: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A trained repository as the working directory; the bench repeats nothing."""
    repository = trained.copy(tmp_path / "repository")
    (repository.root / BENCH).write_text(json.dumps(EARLIER), encoding="utf-8")
    monkeypatch.chdir(repository.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for module in (bench, scaling):
        monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(scaling, "SUMS", 2)
    monkeypatch.setattr(tracking_stores, "CALLS", 6)
    return repository


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Run in this process what the bench would start others for, as a group of one; return the commands."""
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], env: dict[str, str], **options: object) -> Any:
        commands.append(command)
        if options.get("stdout") == subprocess.PIPE:
            return SimpleNamespace(stdout="1.5")  # the seconds of an epoch
        if command[0] != sys.executable:
            return None
        _, kind, code, *arguments = command
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [kind, *arguments])
            if root := env.get("DVC_ROOT"):
                patch.setenv("DVC_ROOT", root)
                (Path(root) / "mlflow.db").write_bytes(empty_database())
            if kind == "-m":
                runpy.run_module(code, run_name="__main__")
            else:
                exec(code, {})
        return None

    def elastic_launch(config: object, work: Callable[[Params], Any]) -> Callable[[Params], list[Any]]:
        return lambda params: [work(params)]

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE))
    monkeypatch.setattr(scaling, "elastic_launch", elastic_launch)
    group_of_one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in (group_of_one | {"TORCHELASTIC_RESTART_COUNT": "0"}).items():
        monkeypatch.setenv(name, value)
    return commands


@pytest.fixture(autouse=True)
def signals() -> Any:
    """Give the signals back that a group's leader takes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_each_part_is_measured_and_the_pages_carry_it(
    repository: Repository, no_processes: list[Sequence[str]]
) -> None:
    bench.measure(PARTS)
    measured = json.loads(BENCH.read_text(encoding="utf-8"))
    assert set(measured) == {*PARTS, *EARLIER}
    assert measured["train_peak_memory_mb"] == EARLIER["train_peak_memory_mb"]
    assert ["dvc", "repro", "--quiet"] in [list(command) for command in no_processes]
    page = renew(MARKED)
    for row in ("An epoch: plain", "Start-up of train", "A training: fast", "2 processes of 1 thread", "SQLite"):
        assert f"| {row}" in page
    assert "**1.23 GB**" in " ".join(page.split())


@pytest.mark.pipeline
@pytest.mark.thorough
def test_the_parts_that_start_processes_start_them(repository: Repository) -> None:
    bench.measure(["pipeline_seconds", "scaling", "tracking_seconds", "train_peak_memory_mb"])
    measured = json.loads(BENCH.read_text(encoding="utf-8"))
    assert all(rate > 0 for rates in measured["scaling"]["images_a_second"].values() for rate in rates)
    assert measured["tracking_seconds"][0] > 0
    assert 100 < measured["train_peak_memory_mb"] < 10_000


def test_a_part_that_does_not_exist_is_refused(repository: Repository) -> None:
    with pytest.raises(UserError, match=r"nonsense is not a part of the bench: choose from epoch_seconds, trainings, "):
        bench.measure(["floor", "nonsense"])
    assert json.loads(BENCH.read_text(encoding="utf-8")) == EARLIER
