"""`mnist reproduce` compares digests and says how much a run differs from the committed one."""

import os
import re
import shutil
from pathlib import Path

import pytest
from support import DATA
from support.repository import Repository

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import write_csv, write_json
from mnist_pipeline.common.paths import HISTORY, METRICS, PREDICTIONS
from mnist_pipeline.reproduce import describe_difference, output_digests, reproduce_commit

LOCK = """
schema: '2.0'
stages:
  train:
    cmd: python stages/train.py
    deps: [{path: data/raw, hash: md5, md5: aa.dir, size: 1}]
    outs: [{path: models/model.safetensors, hash: md5, md5: bb, size: 2}]
  evaluate:
    cmd: python stages/evaluate.py
    outs: [{path: reports/metrics.json, hash: md5, md5: cc, size: 3}]
"""


def write_run(directory: Path, losses: list[float], predictions: list[int]) -> Path:
    write_csv(directory / HISTORY, [{"epoch": epoch, "train_loss": loss} for epoch, loss in enumerate(losses, 1)])
    rows = [{"index": index, "label": index, "prediction": made} for index, made in enumerate(predictions)]
    write_csv(directory / PREDICTIONS, rows)
    right = sum(row["label"] == row["prediction"] for row in rows)
    write_json(directory / METRICS, {"test_accuracy": right / len(rows)})
    return directory


def test_a_directory_without_a_commit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="there is nothing to compare with"):
        reproduce_commit()


def test_a_commit_without_outputs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(tmp_path / "repository", fresh=True).init()
    monkeypatch.chdir(repository.root)
    with pytest.raises(UserError, match=r"^dvc\.lock is not committed: run `make repro`"):
        reproduce_commit()


DVC = """#!/bin/sh
case $1 in
    repro) pwd; ls data/added/mine ;;
    *) exec {} "$@" ;;
esac
"""


@pytest.mark.pipeline
def test_in_a_directory_of_a_larger_repository_the_pipeline_runs_in_the_same_place(
    trained: Repository, tmp_path: Path
) -> None:
    repository = trained.copy(tmp_path / "larger one/pipeline")
    shutil.rmtree(repository.root / ".git")
    shutil.copytree(DATA, repository.root / "data/added/mine")
    in_larger = {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    Repository(tmp_path / "larger one").run("git", "init", "--quiet").check_returncode()
    repository.dvc("add", "--quiet", "data/added/mine", **in_larger).check_returncode()
    for command in (["add", "--all"], ["commit", "--quiet", "--message", "Keep"]):
        repository.run("git", *command, **in_larger).check_returncode()
    (tmp_path / "dvc").write_text(DVC.format(shutil.which("dvc")))  # instead of a run, it says what it would run on
    (tmp_path / "dvc").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{repository.environment['PATH']}"
    ended = repository.run("mnist", "reproduce", PATH=path, **in_larger)
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"(?m)^\S+/clone/pipeline$", ended.stdout)
    assert {path.name for path in DATA.glob("*-ubyte")} <= set(ended.stdout.split())
    assert "Verdict: identical" in ended.stdout


def test_only_outputs_are_compared(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text(LOCK)
    assert output_digests(tmp_path / "dvc.lock") == {"models/model.safetensors": "bb", "reports/metrics.json": "cc"}


@pytest.mark.parametrize(
    ("losses", "predictions", "said"),
    [
        ([0.5, 0.25], [0, 1, 2, 3], ["at most 0 ", "0 of 4 predictions", "accuracy is 100.00% and was 100.00%"]),
        ([0.5, 0.2501], [0, 1, 2, 3], ["at most 0.0001 (train_loss, epoch 2)", "0 of 4 predictions"]),
        ([0.75, 0.25], [0, 1, 2, 9], ["at most 0.25 (train_loss, epoch 1)", "1 of 4", "is 75.00% and was 100.00%"]),
        ([0.5], [0, 1, 2, 3], ["another number of epochs"]),
    ],
)
def test_a_difference_is_measured(tmp_path: Path, losses: list[float], predictions: list[int], said: list[str]) -> None:
    committed = write_run(tmp_path / "committed", [0.5, 0.25], [0, 1, 2, 3])
    again = write_run(tmp_path / "again", losses, predictions)
    verdict = describe_difference(committed, again)
    assert verdict.startswith("different")
    for part in said:
        assert part in verdict


def test_a_difference_is_measured_without_predictions_that_dvc_lost(tmp_path: Path) -> None:
    committed, again = (write_run(tmp_path / name, [0.5], [0, 1]) for name in ("committed", "again"))
    (committed / PREDICTIONS).unlink()
    assert "epoch 1); the accuracy is 100.00% and was 100.00%" in describe_difference(committed, again)
