"""DVC's experiments, queued, temporary and in the workspace: each is one run of its name, with DVC's own numbers."""

import json
import re
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from mlflow.entities import Run
from support.repository import Repository

from mnist_pipeline.common.params import flatten

pytestmark = pytest.mark.pipeline

QUEUED = {"slow": 0.001, "middling": 0.002, "fast": 0.004}  # names, and learning rates
SHARED = "slow"  # the one that two processes train
EXECUTED = [*QUEUED, "temporary"]
ALL = [*EXECUTED, "restored"]


@dataclass(frozen=True)
class Story:
    """What each experiment said, how DVC shows it, and the runs."""

    queue: list[str] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def run(self, name: str) -> Run:
        [run] = [run for run in self.runs if run.info.run_name == name]
        return run


def wait_for(repository: Repository, unwanted: str, seconds: float = 300) -> list[str]:
    """Wait until `dvc queue status` does not show what matches a pattern, and return all that it showed."""
    shown: list[str] = []
    end = time.monotonic() + seconds
    while not shown or re.search(unwanted, shown[-1]):
        assert time.monotonic() < end, shown[-1:]
        time.sleep(2)  # to ask takes as much of the processor as to train
        shown.append(repository.dvc("queue", "status").stdout)
    return shown


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Run experiments in a repository with the data and without a database."""
    repository = Repository.create(tmp_path_factory.mktemp("experiments"), fresh=True).init()
    repository.dvc("repro", "download").check_returncode()
    repository.commit()
    assert not (repository.root / "mlflow.db").exists()
    story = Story()

    def experiment(*options: str, **params: object) -> str:
        settings = [option for name, value in params.items() for option in ("-S", f"{name}={value}")]
        process = repository.dvc("exp", "run", *options, *settings)
        assert process.returncode == 0, process.stdout
        return process.stdout

    for name, learning_rate in QUEUED.items():
        processes = 2 if name == SHARED else 1
        experiment("--queue", "--name", name, **{"train.learning_rate": learning_rate, "train.processes": processes})
    try:
        start = ["dvc", "queue", "start", "--jobs", "2"]  # the workers inherit its pipes: with one, it would never end
        quiet = subprocess.DEVNULL
        subprocess.run(start, cwd=repository.root, env=repository.environment, stdout=quiet, stderr=quiet, check=True)
        story.queue.extend(wait_for(repository, "Queued|Running"))
        story.said.update({name: repository.dvc("queue", "logs", name).stdout for name in QUEUED})
        temporary = {"train.learning_rate": 0.008}
        story.said["temporary"] = experiment("--temp", "--name", "temporary", **temporary)
        trained = {"train.learning_rate": QUEUED["middling"], "report.gallery_size": 5}
        story.said["restored"] = experiment("--name", "restored", **trained)
        wait_for(repository, r"[1-9]\d* (active|idle)")
    finally:
        repository.dvc("queue", "stop", "--kill")
    for commit in json.loads(repository.dvc("exp", "show", "--json").stdout):
        for shown in commit["experiments"] or []:
            story.shown[shown["name"]] = shown["revs"][0]["data"]
    story.runs.extend(repository.runs())
    return story


def shown_by_dvc(story: Story, name: str, kind: str) -> dict[str, Any]:
    """Return the params or metrics of an experiment, flat, from the one file that has them."""
    [file] = story.shown[name][kind].values()
    return flatten(file["data"])


def test_two_experiments_run_at_a_time(story: Story) -> None:
    assert max(status.count("Running") for status in story.queue) == 2


@pytest.mark.parametrize("name", QUEUED)
def test_a_queued_experiment_succeeds(story: Story, name: str) -> None:
    assert re.search(rf"\b{name} .*\bSuccess\b", story.queue[-1])


@pytest.mark.parametrize("name", ALL)
def test_the_store_fails_in_no_experiment(story: Story, name: str) -> None:
    assert "Updating lock file" in story.said[name]
    assert not re.search("warning: |error: |Traceback", story.said[name])


def test_each_experiment_is_one_run(story: Story) -> None:
    assert sorted(run.info.run_name for run in story.runs) == sorted(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_run_is_finished_and_of_its_experiment(story: Story, name: str) -> None:
    assert story.run(name).info.status == "FINISHED"
    assert story.run(name).data.tags["dvc_experiment"] == name


@pytest.mark.parametrize("name", ALL)
def test_a_run_says_whether_its_training_was_executed_or_restored(story: Story, name: str) -> None:
    tags = story.run(name).data.tags
    assert ("Running stage 'train'" in story.said[name]) == (name in EXECUTED)
    assert tags["backfilled"] == tags["evaluate.backfilled"] == str(name not in EXECUTED).lower()


@pytest.mark.parametrize("name", ALL)
def test_dvc_and_mlflow_agree_on_the_params(story: Story, name: str) -> None:
    shown = shown_by_dvc(story, name, "params")
    assert story.run(name).data.params == {param: str(value) for param, value in shown.items()}


@pytest.mark.parametrize("name", ALL)
def test_dvc_and_mlflow_agree_on_the_metrics(story: Story, name: str) -> None:
    shown, logged = shown_by_dvc(story, name, "metrics"), story.run(name).data.metrics
    assert "test_accuracy" in shown
    assert {metric: logged.get(metric) for metric in shown} == pytest.approx(shown)


def test_the_params_are_those_that_were_set(story: Story) -> None:
    rates = {name: story.run(name).data.params["train.learning_rate"] for name in ALL}
    assert rates == {"slow": "0.001", "middling": "0.002", "fast": "0.004", "temporary": "0.008", "restored": "0.002"}
    assert story.run("restored").data.params["report.gallery_size"] == "5"
    processes = {name: story.run(name).data.params["train.processes"] for name in ALL}
    assert processes == {name: "2" if name == SHARED else "1" for name in ALL}


def test_a_restored_training_has_the_model_of_the_one_that_was_executed(story: Story) -> None:
    assert story.run("restored").data.tags["model_sha256"] == story.run("middling").data.tags["model_sha256"]
