"""The pipeline as a user runs it: a real `dvc repro` on five hundred digits, in a repository of its own."""

import json
import re
import subprocess
from dataclasses import dataclass

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support.repository import FIRST_REPRO, REPORTS, Repository

pytestmark = pytest.mark.pipeline

OUTPUTS = ["dvc.lock", "data/raw/*", "models/*.safetensors", "reports/**/*"]
STAGES = ["download", "train", "evaluate", "report"]


@dataclass(frozen=True)
class Step:
    """What a command said, and what was there after it."""

    process: subprocess.CompletedProcess[str]
    files: dict[str, bytes]
    runs: list[Run]

    @property
    def said(self) -> str:
        return self.process.stdout

    @property
    def executed(self) -> list[str]:
        return re.findall(r"Running stage '(\w+)'", self.said)


@pytest.fixture(scope="module")
def repository(trained: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return trained.copy(tmp_path_factory.mktemp("pipeline") / "repository")


@pytest.fixture(scope="module")
def story(repository: Repository) -> dict[str, Step]:
    """Run what a user does in a day, in this order, and keep what each step showed."""
    steps: dict[str, Step] = {}

    def keep(name: str, process: "subprocess.CompletedProcess[str]") -> None:
        found = [path for pattern in OUTPUTS for path in repository.root.glob(pattern) if path.is_file()]
        files = {str(path.relative_to(repository.root)): path.read_bytes() for path in found}
        steps[name] = Step(process, files, repository.runs())

    first = (repository.root / FIRST_REPRO).read_text(encoding="utf-8")
    keep("first", subprocess.CompletedProcess("dvc repro", 0, first))
    keep("again", repository.dvc("repro"))
    keep("status", repository.dvc("status"))
    keep("reproduced", repository.run("mnist", "reproduce"))
    repository.set_param("epochs", "1")
    keep("shorter", repository.dvc("repro"))
    keep("params diff", repository.dvc("params", "diff"))
    keep("metrics show", repository.dvc("metrics", "show"))
    keep("plots show", repository.dvc("plots", "show"))
    repository.set_param("learning_rate", "0,002")
    keep("mistaken", repository.dvc("repro"))
    return steps


@pytest.mark.parametrize("name", ["again", "status", "shorter", "params diff", "metrics show", "plots show"])
def test_the_command_succeeds(story: dict[str, Step], name: str) -> None:
    assert story[name].process.returncode == 0, story[name].said


def test_the_first_repro_runs_all_stages(story: dict[str, Step]) -> None:
    assert story["first"].executed == STAGES


@pytest.mark.parametrize(
    "path",
    [
        "data/raw/train-images-idx3-ubyte",
        "models/model.safetensors",
        "reports/history.csv",
        "reports/metrics.json",
        "reports/predictions.csv",
        "reports/report.md",
        "reports/calibration.csv",
        "reports/robustness.csv",
        "reports/report.html",
        "reports/figures/accuracy.png",
    ],
)
def test_the_outputs_are_there(story: dict[str, Step], path: str) -> None:
    assert len(story["first"].files[path]) > 0


def test_git_is_left_with_nothing_that_should_not_be_committed(story: dict[str, Step], repository: Repository) -> None:
    committed = repository.run("git", "ls-files").stdout.split()
    assert "dvc.lock" in committed
    assert "reports/report.md" in committed
    assert [name for name in committed if re.match(r"mlflow|mlartifacts|models/model|data/raw", name)] == []


def test_the_training_is_one_run_with_each_epochs_metrics(story: dict[str, Step], repository: Repository) -> None:
    [run] = story["first"].runs
    client = MlflowClient(tracking_uri=f"sqlite:///{repository.root / 'mlflow.db'}")
    history = client.get_metric_history(run.info.run_id, "monitor_accuracy")
    assert [point.step for point in history] == [1, 2]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "2"


def test_the_run_has_the_test_metrics_of_the_file(story: dict[str, Step]) -> None:
    [run] = story["first"].runs
    metrics = json.loads(story["first"].files["reports/metrics.json"])
    assert metrics["test_total"] == 200
    assert run.data.metrics["test_accuracy"] == metrics["test_accuracy"]
    assert run.data.metrics["test_per_class_accuracy.7"] == metrics["test_per_class_accuracy"]["7"]


def test_the_run_has_the_reports(story: dict[str, Step], repository: Repository) -> None:
    [run] = story["first"].runs
    client = MlflowClient(tracking_uri=f"sqlite:///{repository.root / 'mlflow.db'}")
    assert {file.path for file in client.list_artifacts(run.info.run_id, "reports")} == {
        f"reports/{name}" for name in REPORTS
    }


def test_a_second_repro_executes_nothing(story: dict[str, Step]) -> None:
    assert story["again"].executed == []
    assert re.findall(r"Stage '(\w+)' didn't change, skipping", story["again"].said) == STAGES
    assert len(story["again"].runs) == 1


def test_the_status_is_clean(story: dict[str, Step]) -> None:
    assert "Data and pipelines are up to date." in story["status"].said


def test_the_commit_is_reproduced_byte_for_byte_without_a_trace(story: dict[str, Step]) -> None:
    assert story["reproduced"].process.returncode == 0, story["reproduced"].said
    for output in ("data/raw", "models/model.safetensors", "reports/report.md"):
        assert re.search(rf"{output} +identical", story["reproduced"].said)
    assert "Verdict: identical" in story["reproduced"].said
    assert story["reproduced"].files == story["first"].files
    assert len(story["reproduced"].runs) == 1


def test_another_param_reruns_the_stages_that_it_reaches(story: dict[str, Step]) -> None:
    assert story["shorter"].executed == ["train", "evaluate", "report"]
    assert "Stage 'download' didn't change, skipping" in story["shorter"].said
    assert len(story["shorter"].files["reports/history.csv"].splitlines()) == 2  # a header and one epoch


def test_dvc_shows_the_change_of_a_param(story: dict[str, Step]) -> None:
    assert re.search(r"params\.yaml\s+train\.epochs\s+2\s+1", story["params diff"].said)


def test_dvc_shows_the_metrics(story: dict[str, Step]) -> None:
    assert "reports/metrics.json" in story["metrics show"].said
    assert "accuracy" in story["metrics show"].said


def test_dvc_shows_the_plots(story: dict[str, Step], repository: Repository) -> None:
    assert "dvc_plots/index.html" in story["plots show"].said
    page = (repository.root / "dvc_plots/index.html").read_text(encoding="utf-8")
    for title in ("Loss", "Accuracy", "Reliability", "Learning rate", "Mistakes on the test images", "corrupted"):
        assert title in page


def test_a_bad_param_ends_the_repro_with_one_line(story: dict[str, Step]) -> None:
    said = story["mistaken"].said
    assert story["mistaken"].process.returncode != 0
    assert re.findall("(?m)^error: .*$", said) == [
        "error: params.yaml: train.learning_rate must be a valid number, and is the text '0,002'"
    ]
    assert "Traceback" not in said
    assert len(story["mistaken"].runs) == len(story["shorter"].runs)
