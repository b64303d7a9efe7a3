"""Studies and sweeps in a real Ray cluster of two nodes on loopback, each node in a clone of its own."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from mlflow.entities import Run
from support.repository import Repository
from support.servers import Server, free_port, serving
from support.trials import wait_for

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]
pytest.importorskip("ray")

RATES = "params:\n  train.learning_rate: {low: 0.001, high: 0.1, log: true}\n"


class Node:
    """A node of one core that `ray start` started in a repository; all its processes are in one group."""

    def __init__(self, repository: Repository, *options: str) -> None:
        apart = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]  # two on one machine
        self.log = repository.root / "node.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                ["ray", "start", "--block", "--num-cpus=1", *apart, *options],
                cwd=repository.root,
                env=repository.environment
                | {"PYTHONPATH": str(repository.root / "src"), "RAY_USAGE_STATS_ENABLED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(lambda: "Ray runtime started" in self.log.read_text())

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Cluster:
    """The repository of the driver, whose node is the head, and the repository of another node."""

    driver: Repository
    other: Repository
    address: str
    node: Node | None = None

    def start_node(self) -> None:
        """Start the other's node unless it runs."""
        if self.node is None or self.node.process.poll() is not None:
            self.node = Node(self.other, f"--address={self.address}")

    def command(self, space: str, trials: int) -> list[str]:
        return ["mnist", "sweep", space, "--trials", str(trials), "--ray", self.address]

    def runs_of(self, name: str) -> list[Run]:
        if self.driver.client.get_experiment_by_name("mnist") is None:  # no run has begun yet
            return []
        return [run for run in self.driver.runs() if run.info.run_name.startswith(f"{name}-")]

    def ran_on_other(self, run: Run) -> bool:
        return str(run.data.tags["workspace"]).endswith(f":{self.other.root}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    with serving(directory, f"sqlite:///{directory / 'server.db'}") as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")
    driver = Repository.create(root / "driver", server.uri, validation_size=100, epochs=3, batch_size=16)
    (driver.root / "requirements.lock").write_text("torch==2.9\n")
    driver.init()
    driver.dvc("remote", "add", "--default", "storage", str(root / "storage")).check_returncode()
    driver.dvc("repro", "download").check_returncode()
    driver.dvc("push").check_returncode()
    driver.commit()
    driver.run("git", "clone", "--quiet", ".", str(root / "other")).check_returncode()
    other = Repository(root / "other", server.uri)
    port = next(port for port in iter(free_port, None) if port > 20000)  # those below are for Ray's workers
    session = tempfile.mkdtemp(prefix="ray-")  # the paths of its sockets must be short
    found = Cluster(driver, other, f"127.0.0.1:{port}")
    head = Node(driver, "--head", f"--port={port}", f"--temp-dir={session}", "--include-dashboard=false")
    try:
        found.start_node()
        yield found
    finally:
        if found.node:
            found.node.kill()
        head.kill()
        shutil.rmtree(session, ignore_errors=True)


def test_a_sweep_uses_all_nodes_and_brings_them_the_data(cluster: Cluster) -> None:
    cluster.start_node()
    (cluster.driver.root / "rates.yaml").write_text(RATES)
    assert not (cluster.other.root / "data/raw").exists()
    said = cluster.driver.run(*cluster.command("rates.yaml", 4))
    assert said.returncode == 0, said.stdout
    assert said.stdout.endswith("Next: mnist experiment rates\n")
    runs = cluster.runs_of("rates")
    assert {run.info.run_name for run in runs} == {f"rates-{number}" for number in range(4)}
    assert {cluster.ran_on_other(run) for run in runs} == {True, False}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert cluster.driver.steps(run, "monitor_accuracy") == [1, 2, 3]
    assert (cluster.other.root / "data/raw").is_dir()
    assert (cluster.driver.root / "experiments/rates.yaml").is_file()


def test_a_study_runs_in_the_cluster(cluster: Cluster) -> None:
    cluster.start_node()
    (cluster.driver.root / "experiments/quick.yaml").write_text("train:\n  epochs: 1\n")
    said = cluster.driver.run("mnist", "study", "quick", "--seeds", "2", "--ray", cluster.address)
    assert said.returncode == 0, said.stdout
    assert "2 seeds, test_accuracy" in said.stdout
    assert len((cluster.driver.root / "reports/studies/quick.csv").read_text().splitlines()) == 3


def test_a_trial_whose_node_dies_runs_again(cluster: Cluster) -> None:
    cluster.start_node()
    (cluster.driver.root / "dying.yaml").write_text(f"{RATES}  train.epochs: [30]\n")
    driver = cluster.driver.start(*cluster.command("dying.yaml", 2))
    wait_for(lambda: any(cluster.ran_on_other(run) and run.data.metrics for run in cluster.runs_of("dying")))
    assert cluster.node
    cluster.node.kill()
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert re.search(r"dying-\d: its node died \(\w+\), so it runs again", said)
    finished = [run for run in cluster.runs_of("dying") if run.info.status == "FINISHED"]
    lost = [run for run in cluster.runs_of("dying") if run.info.status != "FINISHED"]
    assert {run.info.run_name for run in finished} == {"dying-0", "dying-1"}
    assert not any(map(cluster.ran_on_other, finished))
    assert [(run.info.status, cluster.ran_on_other(run)) for run in lost] == [("FAILED", True)]
    assert all(cluster.driver.steps(run) == list(range(1, 31)) for run in finished)


def test_a_sweep_whose_driver_is_killed_goes_on(cluster: Cluster) -> None:
    cluster.start_node()
    (cluster.driver.root / "killed.yaml").write_text(f"{RATES}  train.epochs: [20]\n")
    driver = cluster.driver.start(*cluster.command("killed.yaml", 3))
    wait_for(lambda: any(run.info.status == "FINISHED" for run in cluster.runs_of("killed")))
    driver.kill()
    driver.wait()
    before = {run.info.run_id for run in cluster.runs_of("killed") if run.info.status == "FINISHED"}
    again = cluster.driver.run(*cluster.command("killed.yaml", 3))
    assert again.returncode == 0, again.stdout
    runs = cluster.runs_of("killed")
    finished = [run for run in runs if run.info.status == "FINISHED"]
    assert {run.info.run_name for run in finished} == {"killed-0", "killed-1", "killed-2"}
    assert len(finished) <= 4  # one may have ended just before the driver, which did not hear of it
    assert before <= {run.info.run_id for run in finished}
    assert not [run for run in runs if run.info.status == "RUNNING"]


def test_a_sweep_that_is_interrupted_ends_its_trainings(cluster: Cluster) -> None:
    cluster.start_node()
    (cluster.driver.root / "interrupted.yaml").write_text(f"{RATES}  train.epochs: [10000]\n")
    driver = cluster.driver.start(*cluster.command("interrupted.yaml", 2))
    wait_for(lambda: len([run for run in cluster.runs_of("interrupted") if run.data.metrics]) == 2)
    driver.terminate()
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode != 0, said
    assert [run.info.status for run in cluster.runs_of("interrupted")] == ["KILLED"] * 2


def test_another_commit_and_another_lock_file_are_refused(cluster: Cluster) -> None:
    cluster.start_node()
    (cluster.driver.root / "refused.yaml").write_text(f"{RATES}  train.epochs: [200]\n")
    commit = cluster.driver.run("git", "rev-parse", "HEAD").stdout.strip()
    for changed in ("src/mnist_pipeline/model/network.py", "requirements.lock"):
        with (cluster.other.root / changed).open("a") as file:
            file.write("# changed\n")
    cluster.other.commit()
    try:
        ended = cluster.driver.run(*cluster.command("refused.yaml", 2))
    finally:
        cluster.other.run("git", "reset", "--hard", "HEAD~").check_returncode()
    assert ended.returncode == 1, ended.stdout
    assert "Traceback" not in ended.stdout
    [error] = [line for line in ended.stdout.splitlines() if line.startswith("error: ")]
    assert re.search(
        rf"node [\d.]+ \(\S+\) is refused: its commit is \w{{40}}, the driver's {commit}; "
        r"its code's SHA-256 is \w{64}, the driver's \w{64}; "
        r"its requirements.lock's SHA-256 is \w{64}, the driver's \w{64}",
        error,
    )
