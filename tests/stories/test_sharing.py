"""What others get: pushed outputs that run nothing anew, MLflow runs made from them, and diffs between commits."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest
from mlflow.entities import Run
from support.repository import Repository

from mnist_pipeline.common.params import flatten

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]


@dataclass(frozen=True)
class Tracked:
    """A run and the epochs that it has, as they were at the time."""

    run: Run
    epochs: list[int]


@dataclass(frozen=True)
class Story:
    """What each command said, the runs after some, and the page of `dvc plots diff`."""

    steps: dict[str, "subprocess.CompletedProcess[str]"]
    runs: dict[str, list[Tracked]]
    notes: dict[str, str]

    def said(self, name: str) -> str:
        return self.steps[name].stdout

    def executed(self, name: str) -> list[str]:
        return re.findall(r"Running stage '(\w+)'", self.said(name))


def lose_the_database(repository: Repository) -> None:
    for file in repository.root.glob("mlflow.db*"):
        file.unlink()
    shutil.rmtree(repository.root / "mlartifacts")


@pytest.fixture(scope="module")
def story(trained: Repository, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Share a pipeline, change it, lose its database and go back, in this order."""
    place = tmp_path_factory.mktemp("sharing")
    first, clone = trained.copy(place / "first"), Repository(place / "clone")
    steps: dict[str, subprocess.CompletedProcess[str]] = {}
    runs: dict[str, list[Tracked]] = {}
    notes: dict[str, str] = {}

    def tracked(name: str, repository: Repository) -> None:
        """Read a copy of the database: MLflow would keep the original open, beyond its end."""
        copy = Repository(place, f"sqlite:///{place / name}.db")
        shutil.copy(repository.root / "mlflow.db", place / f"{name}.db")
        runs[name] = [Tracked(run, copy.steps(run)) for run in copy.runs()]

    tracked("repro", first)
    steps["remote add"] = first.dvc("remote", "add", "--default", "storage", str(place / "storage"))
    steps["push"] = first.dvc("push")
    first.commit()
    first.run("git", "tag", "two-epochs").check_returncode()

    steps["clone"] = first.run("git", "clone", "--quiet", str(first.root), str(clone.root))
    steps["pull"] = clone.dvc("pull")
    steps["repro of the clone"] = clone.dvc("repro")
    steps["git status of the clone"] = clone.run("git", "status", "--porcelain")
    notes["files of the clone"] = " ".join(path.name for path in clone.root.iterdir())
    steps["backfill of the clone"] = clone.backfill()
    steps["backfill again"] = clone.backfill()
    tracked("clone", clone)

    first.set_param("epochs", 1)
    steps["shorter"] = first.dvc("repro")
    tracked("shorter", first)
    first.commit()
    first.run("git", "tag", "one-epoch").check_returncode()
    for kind in ("params", "metrics"):
        steps[f"{kind} diff"] = first.dvc(kind, "diff", "two-epochs", "one-epoch", "--json")
    steps["plots diff"] = first.dvc("plots", "diff", "two-epochs", "one-epoch")
    notes["plots"] = (first.root / "dvc_plots/index.html").read_text(encoding="utf-8")
    for tag in ("two-epochs", "one-epoch"):
        notes[tag] = first.run("git", "show", f"{tag}:reports/metrics.json").stdout

    lose_the_database(first)
    steps["git checkout"] = first.run("git", "checkout", "--quiet", "two-epochs")
    steps["dvc checkout"] = first.dvc("checkout")
    first.set_param("epochs", 1)
    steps["backfill of other params"] = first.backfill()
    tracked("other params", first)
    first.set_param("epochs", 2)
    steps["backfill of the lost"] = first.backfill()
    tracked("lost", first)
    first.set_param("epochs", 1)
    steps["restored"] = first.dvc("repro")
    tracked("restored", first)
    return Story(steps, runs, notes)


def results(tracked: Tracked) -> dict[str, Any]:
    """Return what a backfilled run has in common with the one of the training itself, which alone has the time."""
    data = tracked.run.data
    metrics = {name: value for name, value in data.metrics.items() if name != "epoch_seconds"}
    tags = {name: data.tags[name] for name in ("model_sha256", "data_sha256", "fingerprint")}
    return {"epochs": tracked.epochs, "params": data.params, "metrics": metrics, "tags": tags}


ALL_STAGES = "train, evaluate, report"
ADDED_ALL = f"Added to MLflow, from their outputs: {ALL_STAGES}\n"


@pytest.mark.parametrize(
    "name",
    [
        *("remote add", "push", "clone", "pull", "repro of the clone", "backfill of the clone"),
        *("backfill again", "shorter", "params diff", "metrics diff", "plots diff", "git checkout", "dvc checkout"),
        *("backfill of the lost", "restored"),
    ],
)
def test_the_command_succeeds(story: Story, name: str) -> None:
    assert story.steps[name].returncode == 0, story.said(name)


def test_two_commands_share_the_data_and_the_model(story: Story) -> None:
    pushed = "8 files pushed"  # the four of MNIST, their list, the weights, the predictions and the page
    assert pushed in story.said("push")
    assert re.findall(r"(?m)^A +(\S+)$", story.said("pull")) == [
        "data/raw/",
        "models/model.safetensors",
        "reports/predictions.csv",
        "reports/report.html",
    ]


def test_a_clone_executes_nothing(story: Story) -> None:
    assert story.executed("repro of the clone") == []
    assert len(re.findall(r"Stage '\w+' didn't change, skipping", story.said("repro of the clone"))) == 4
    assert story.said("git status of the clone") == ""


def test_a_clone_has_no_runs_of_others(story: Story) -> None:
    assert "mlflow" not in story.notes["files of the clone"]


def test_a_clone_gets_the_run_of_the_training(story: Story) -> None:
    assert story.said("backfill of the clone") == ADDED_ALL
    [here], [there] = story.runs["repro"], story.runs["clone"]
    assert there.run.info.status == "FINISHED"
    assert there.epochs == [1, 2]
    assert there.run.data.tags["backfilled"] == ALL_STAGES
    assert results(there) == results(here)


def test_a_second_backfill_adds_nothing(story: Story) -> None:
    assert story.said("backfill again") == "MLflow has all of the run of models/model.safetensors\n"
    assert len(story.runs["clone"]) == 1


def test_a_lost_database_is_made_again(story: Story) -> None:
    assert story.said("backfill of the lost") == ADDED_ALL
    [before], [after] = story.runs["repro"], story.runs["lost"]
    assert after.run.info.status == "FINISHED"
    assert after.run.data.tags["backfilled"] == ALL_STAGES
    assert results(after) == results(before)


def test_no_run_is_made_of_outputs_of_other_params(story: Story) -> None:
    assert story.steps["backfill of other params"].returncode == 1
    assert re.fullmatch(r"error: .*`dvc status`.*`dvc repro`\n", story.said("backfill of other params"))
    assert story.runs["other params"] == []


def test_a_training_that_dvc_restores_gets_its_run(story: Story) -> None:
    assert "Stage 'train' is cached - skipping run, checking out outputs" in story.said("restored")
    assert story.executed("restored") == ["report"]
    assert "Added to MLflow, from their outputs: train, evaluate\n" in story.said("restored")
    assert len(story.runs["restored"]) == 2
    trained, restored = story.runs["shorter"][0], story.runs["restored"][0]
    assert restored.run.data.params["train.epochs"] == "1"
    assert restored.run.data.tags["backfilled"] == "train, evaluate"
    assert results(restored) == results(trained)


def test_the_params_diff_names_what_changed_alone(story: Story) -> None:
    assert json.loads(story.said("params diff")) == {"params.yaml": {"train.epochs": {"old": 2, "new": 1, "diff": -1}}}


def test_the_metrics_diff_names_what_changed_alone(story: Story) -> None:
    [(path, shown)] = json.loads(story.said("metrics diff")).items()
    old, new = (flatten(json.loads(story.notes[tag])) for tag in ("two-epochs", "one-epoch"))
    assert path == "reports/metrics.json"
    assert {name: (change["old"], change["new"]) for name, change in shown.items()} == {
        name: (old[name], new[name]) for name in old if old[name] != new[name]
    }
    assert "test_loss" in shown
    assert "parameters" not in shown


@pytest.mark.parametrize(
    "text", ["two-epochs", "one-epoch", "Loss", "Accuracy", "Learning rate", "Mistakes", "Reliability"]
)
def test_the_plots_diff_shows_both_commits(story: Story, text: str) -> None:
    assert "dvc_plots/index.html" in story.said("plots diff")
    assert text in story.notes["plots"]
