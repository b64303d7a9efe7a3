"""DVC's experiments, queued, temporary and in the workspace: each is one MLflow run with the numbers that DVC shows."""

import json
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from mlflow.entities import Run
from support.repository import Repository

from mnist_pipeline.common.params import flatten

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]

RECIPE = "model:\n  channels: [4, 5, 4, 4, 4, 4]\n  bias: false\ntrain:\n  learning_rate: 0.002\n  optimizer: muon\n"


@dataclass(frozen=True)
class Story:
    """The params of each experiment that ran, what it printed, how DVC shows it, and the new MLflow runs.

    The last experiment is `restored`: it has the training params of the one before it that `copied` names.
    """

    repository: Repository
    settings: dict[str, dict[str, object]]
    copied: str
    queue: list[str] = field(default_factory=list)
    printed: dict[str, str] = field(default_factory=dict)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def run(self, name: str) -> Run:
        [run] = [run for run in self.runs if run.info.run_name == name]
        return run

    def experiment(self, name: str, *options: str) -> None:
        settings = [f"--set-param={key}={json.dumps(value)}" for key, value in self.settings[name].items()]
        self.call("dvc", "exp", "run", "--name", name, *options, *settings)

    def call(self, *command: str) -> None:
        """Run an experiment, or queue it; its name is the last word of the command if no option names it."""
        process = self.repository.run(*command)
        assert process.returncode == 0, process.stdout
        name = command[command.index("--name") + 1] if "--name" in command else command[2]
        self.printed[name] = process.stdout

    def run_queue(self, names: Sequence[str], jobs: int) -> None:
        """Run what is queued, to its end."""
        start = ["dvc", "queue", "start", "--jobs", str(jobs)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the workers would keep a pipe open
        subprocess.run(start, cwd=self.repository.root, env=self.repository.environment, check=True, **quiet)
        self.wait_for_queue("Queued|Running")
        self.printed.update({name: self.repository.dvc("queue", "logs", name).stdout for name in names})

    def wait_for_queue(self, unwanted: str) -> None:
        """Wait until `dvc queue status` shows nothing that matches a pattern."""
        end = time.monotonic() + 900
        while not self.queue or re.search(unwanted, self.queue[-1]):
            assert time.monotonic() < end, self.queue[-1:]
            time.sleep(4)  # asking takes as much of the processor as training
            self.queue.append(self.repository.dvc("queue", "status").stdout)

    def end(self, runs_before: Sequence[Run] = ()) -> "Story":
        """Stop the queue's workers and collect what DVC and MLflow show."""
        before = {run.info.run_id for run in runs_before}
        for commit in json.loads(self.repository.dvc("exp", "show", "--json").stdout):
            for shown in commit["experiments"] or []:
                self.shown[shown["name"]] = shown["revs"][0]["data"]
        self.runs.extend(run for run in self.repository.runs() if run.info.run_id not in before)
        return self


def short_story(repository: Repository) -> Story:
    """Queue a recipe in a trained repository by `mnist experiment`, then run the same training in the workspace."""
    (repository.root / "experiments/quick.yaml").write_text(RECIPE)
    changed = {"model.channels": [4, 5, 4, 4, 4, 4], "model.bias": False, "train.learning_rate": 0.002}
    changed |= {"train.optimizer": "muon"}
    settings = {"quick": changed, "restored": changed | {"report.gallery_size": 5}}
    story, runs = Story(repository, settings, "quick"), repository.runs()
    try:
        story.call("mnist", "experiment", "quick", "--queue")
        story.run_queue(["quick"], jobs=1)
        story.experiment("restored")
    finally:
        repository.dvc("queue", "stop", "--kill")
    return story.end(runs)


def long_story(repository: Repository) -> Story:
    """Queue three experiments, two at a time and one of them in two processes, without a database; then two more."""
    repository.init()
    repository.dvc("repro", "download").check_returncode()
    repository.commit()
    assert not (repository.root / "mlflow.db").exists()
    queued: dict[str, dict[str, object]] = {
        "slow": {"train.learning_rate": 0.001, "train.processes": 2},
        "middling": {"train.learning_rate": 0.002},
        "fast": {"train.learning_rate": 0.004},
    }
    restored = {"train.learning_rate": 0.002, "report.gallery_size": 5}
    settings = {**queued, "temporary": {"train.learning_rate": 0.008}, "restored": restored}
    story = Story(repository, settings, "middling")
    for name in queued:
        story.experiment(name, "--queue")
    try:
        story.run_queue(list(queued), jobs=2)
        assert max(status.count("Running") for status in story.queue) == 2
        story.experiment("temporary", "--temp")
        story.experiment("restored")
        story.wait_for_queue(r"[1-9]\d* (active|idle)")
    finally:
        repository.dvc("queue", "stop", "--kill")
    return story.end()


@pytest.fixture(scope="module", params=["short", "long"])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trained: Repository) -> Story:
    root = tmp_path_factory.mktemp("experiments")
    if request.param == "short":
        return short_story(trained.copy(root))
    return long_story(Repository.create(root, fresh=True))


def test_queued_experiments_succeed(story: Story) -> None:
    queued = [name for name in story.settings if name not in ("temporary", "restored")]
    assert all(re.search(rf"\b{name} .*\bSuccess\b", story.queue[-1]) for name in queued)


def test_tracking_fails_in_no_experiment(story: Story) -> None:
    for printed in story.printed.values():
        assert "Updating lock file" in printed
        assert not re.search("warning: |error: |Traceback", printed)


def test_each_experiment_is_one_finished_run(story: Story) -> None:
    assert sorted(run.info.run_name for run in story.runs) == sorted(story.settings)
    for run in story.runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["dvc_experiment"] == run.info.run_name


def test_a_run_says_whether_its_training_was_executed_or_restored(story: Story) -> None:
    for name in story.settings:
        tags = story.run(name).data.tags
        assert ("Running stage 'train'" in story.printed[name]) == (name != "restored")
        assert tags["backfilled"] == ("train, evaluate" if name == "restored" else "none")


def test_a_run_has_the_params_that_were_set_and_that_dvc_shows(story: Story) -> None:
    for name, settings in story.settings.items():
        params = story.run(name).data.params
        assert {key: params[key] for key in settings} == {key: str(value) for key, value in settings.items()}
        del params["data.classes"]  # names, although the file has numbers
        shown = shown_by_dvc(story, name, "params")
        unlogged = ("gate.", "data.classes")
        assert params == {key: str(value) for key, value in shown.items() if not key.startswith(unlogged)}


def test_dvc_and_mlflow_agree_on_the_metrics(story: Story) -> None:
    for name in story.settings:
        shown, logged = shown_by_dvc(story, name, "metrics"), story.run(name).data.metrics
        assert "test_accuracy" in shown
        assert {metric: logged.get(metric) for metric in shown} == pytest.approx(shown)


def shown_by_dvc(story: Story, name: str, kind: str) -> Mapping[str, Any]:
    """Return the params or metrics of an experiment, flat, from the one file that has them."""
    [file] = story.shown[name][kind].values()
    return flatten(file["data"])


def test_a_restored_training_has_the_model_of_the_one_that_was_executed(story: Story) -> None:
    models = {story.run(name).data.tags["model_sha256"] for name in ("restored", story.copied)}
    assert len(models) == 1
