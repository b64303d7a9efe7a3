"""A backfill adds to MLflow, once, what it missed of a run."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from mlflow.entities import Run
from support import DATA
from support.repository import Repository
from support.stores import EPOCHS, TESTED, artifacts, files_in, isolated_tracking, points

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256, write_csv, write_json, write_text
from mnist_pipeline.common.params import flatten, load_params
from mnist_pipeline.common.paths import (
    CALIBRATION,
    FIGURES,
    HISTORY,
    METRICS,
    MODEL,
    PAGE,
    PREDICTIONS,
    RAW,
    REPORT,
    ROBUSTNESS,
)
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.model_file import save_model
from mnist_pipeline.model.network import build_model
from mnist_pipeline.tracking import run
from mnist_pipeline.tracking.backfill import add_stages, backfill_run, missing_stages
from mnist_pipeline.tracking.provenance import trace
from mnist_pipeline.tracking.store import Store

STAGES = ["train", "evaluate", "report"]
MADE_UP = [PREDICTIONS, CALIBRATION, ROBUSTNESS, REPORT, PAGE, FIGURES / "curves.png"]
OUTPUTS = {str(path) for path in [MODEL, HISTORY, METRICS, *MADE_UP]}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a pipeline with made-up outputs; no test changes it."""
    root = Repository.create(tmp_path_factory.mktemp("pipeline")).root
    shutil.copytree(DATA, root / RAW)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        params = load_params()
        save_model(build_model(params.model, seed=0), MODEL, params.model, params.data)
        write_csv(HISTORY, [result.row() for result in EPOCHS])
        write_json(METRICS, TESTED)
        for path in MADE_UP:
            write_text(path, "made up")
    return root


@contextlib.contextmanager
def working_in(pipeline: Path, root: Path, status: int) -> Iterator[pytest.MonkeyPatch]:
    """Work in a pipeline with a store at another root, and a `dvc` that always ends with this status."""
    (root / "bin").mkdir()
    (root / "bin/dvc").write_text(f"#!/bin/sh\nexit {status}\n")
    (root / "bin/dvc").chmod(0o755)
    with isolated_tracking(root) as patch:
        patch.chdir(pipeline)
        patch.setenv("DVC_ROOT", str(root))
        patch.setenv("PATH", str(root / "bin"), prepend=os.pathsep)
        yield patch


def names_of_missing() -> list[str]:
    return [provenance.stage for provenance in missing_stages(Store(), "evaluate", "report")]


@dataclass(frozen=True)
class Story:
    """What two backfills in a row add."""

    store: Repository
    missing: list[list[str]]
    said: list[str]
    runs: list[list[Run]]
    points: list[dict[str, int]]

    @property
    def run(self) -> Run:
        [run] = self.runs[0]
        return run


@pytest.fixture(scope="module")
def story(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(Repository(tmp_path_factory.mktemp("root")), [], [], [], [])
    with working_in(pipeline, story.store.root, status=0):
        story.missing.append(names_of_missing())
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                backfill_run()
            story.said.append(said.getvalue())
            story.missing.append(names_of_missing())
            story.runs.append(story.store.runs())
            story.points.append(points(story.store, story.runs[-1][0]))
        yield story


def test_a_backfill_adds_all_that_is_missing(story: Story) -> None:
    assert story.missing == [STAGES, [], []]
    assert "train, evaluate, report" in story.said[0]
    assert len(story.said[0].splitlines()) == 1


def test_a_second_backfill_adds_nothing(story: Story) -> None:
    assert story.said[1] == "MLflow has all of the run of models/model.safetensors\n"
    assert [run.to_dictionary() for run in story.runs[1]] == [run.to_dictionary() for run in story.runs[0]]
    assert story.points[1] == story.points[0]
    assert len(story.store.client.search_logged_models([story.run.info.experiment_id])) == 1


def test_the_run_is_finished_and_marked_as_backfilled(story: Story, pipeline: Path) -> None:
    assert story.run.info.status == "FINISHED"
    assert story.run.data.tags["backfilled"] == "train, evaluate, report"
    assert story.run.data.tags["model_sha256"] == sha256(pipeline / MODEL)


def test_the_run_has_the_params_of_all_stages(story: Story, pipeline: Path) -> None:
    params = flatten(load_params(pipeline / "params.yaml").model_dump())
    assert story.run.data.params == {name: str(value) for name, value in params.items()}


def test_the_run_has_every_epoch(story: Story) -> None:
    for name, value in EPOCHS[-1].row().items():
        if name != "epoch":
            assert story.store.steps(story.run, name) == [1, 2]
            assert story.run.data.metrics[name] == value


def test_the_run_has_the_test_metrics_and_the_parameter_count(story: Story) -> None:
    found = {name: value for name, value in story.run.data.metrics.items() if name not in EPOCHS[0].row()}
    assert found == flatten(TESTED)


def test_the_model_has_the_metrics_of_the_last_epoch_and_of_the_test(story: Story) -> None:
    [logged] = story.store.client.search_logged_models([story.run.info.experiment_id], "metrics.test_accuracy > 0.98")
    assert {metric.key: metric.value for metric in logged.metrics} == story.run.data.metrics


def test_the_run_has_every_output_and_its_provenance(story: Story, pipeline: Path) -> None:
    assert files_in(artifacts(story.run)) == OUTPUTS | {f"provenance/{stage}.json" for stage in STAGES}
    for output in OUTPUTS:
        assert (artifacts(story.run) / output).read_bytes() == (pipeline / output).read_bytes()


def test_the_run_names_the_images_that_the_training_used(story: Story) -> None:
    found = {dataset.tags[0].value: dataset.dataset.digest for dataset in story.run.inputs.dataset_inputs}
    assert found["train"] == load_digits(DATA, "train").sha256()[:36]
    assert found["monitor"] == load_digits(DATA, "test").sha256()[:36]


# Each of these has a store of its own, and logs no model, which takes seconds


@pytest.fixture
def store(pipeline: Path, tmp_path: Path) -> Iterator[Repository]:
    with working_in(pipeline, tmp_path, status=0) as patch:
        patch.setattr(run, "_save_model", lambda model, directory, *_: write_text(directory / "MLmodel", "made up"))
        yield Repository(tmp_path)


@pytest.mark.parametrize(
    ("tags", "environment", "count"),
    [({}, {}, 1), ({}, {"DVC_EXP_NAME": "trial"}, 2), ({"model_sha256": "0" * 64}, {}, 2)],
    ids=["a part of this training", "of another experiment", "of another model"],
)
def test_a_run_with_a_part_of_the_training_is_completed(
    store: Repository, tags: dict[str, str], environment: dict[str, str], count: int
) -> None:
    with mock.patch.dict(os.environ, environment):
        part = Store().begin_run(trace("train"))
        part.log(tags=tags)
        part.log_epoch(EPOCHS[0].row(), epoch_seconds=9)
    assert names_of_missing() == STAGES
    backfill_run()
    assert names_of_missing() == []
    newest, *others = store.runs()
    assert len([newest, *others]) == count
    assert (newest.info.run_id == part.id) == (count == 1)
    assert [run.info.status for run in others] == ["RUNNING"] * (count - 1)
    assert newest.info.status == "FINISHED"
    assert newest.data.tags["backfilled"] == "train, evaluate, report"
    assert store.steps(newest) == [1, 2]


def test_a_single_stage_is_added_to_the_existing_run(store: Repository) -> None:
    add_stages(Store(), missing_stages(Store(), "evaluate"))
    assert names_of_missing() == ["report"]
    backfill_run()
    assert names_of_missing() == []
    [run] = store.runs()
    assert points(store, run)["test_accuracy"] == 1


def test_a_run_that_the_store_failed_to_close_is_closed(store: Repository) -> None:
    backfill_run()
    [run] = store.runs()
    store.client.update_run(run.info.run_id, "RUNNING")
    backfill_run()
    [run] = store.runs()
    assert run.info.status == "FINISHED"


def test_an_experiment_gets_a_run_of_its_own(store: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    backfill_run()
    monkeypatch.setenv("DVC_EXP_NAME", "trial")
    assert names_of_missing() == STAGES
    backfill_run()
    assert names_of_missing() == []
    trial, first = store.runs()
    assert trial.info.run_name == trial.data.tags["dvc_experiment"] == "trial"
    assert "dvc_experiment" not in first.data.tags
    assert trial.data.metrics == first.data.metrics


def test_outputs_of_other_params_or_code_are_not_added(pipeline: Path, tmp_path: Path) -> None:
    with working_in(pipeline, tmp_path, status=1):
        with pytest.raises(UserError, match=r"dvc status.*dvc repro"):
            backfill_run()
        assert Repository(tmp_path).runs() == []


def test_an_absent_output_is_a_user_error(store: Repository, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pipeline, store.root / "part")
    monkeypatch.chdir(store.root / "part")
    METRICS.unlink()
    with pytest.raises(UserError, match=r"reports/metrics\.json is absent: `dvc repro`"):
        backfill_run()


def test_without_a_model_there_is_nothing_to_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"models/model\.safetensors .*dvc repro"):
        backfill_run()
    assert list(tmp_path.iterdir()) == []
