"""The gate: the verdict of each rule, what it reads from the workspace and the registry, and how its command ends."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from markdown_it import MarkdownIt
from support import DATA, ROOT
from support.clothes import write_clothes_model
from support.stores import isolated_tracking
from support.tables import table

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256, write_json
from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.model.inference import predict, score
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.promotion.bounds import GateParams, load_bounds
from mnist_pipeline.promotion.gate import (
    Candidate,
    Champion,
    NoChampion,
    Verdict,
    decide,
    look_up_champion,
    render_verdicts,
)
from mnist_pipeline.tracking.provenance import sha256_of_images
from mnist_pipeline.tracking.run import MODEL_TAG, TrackedRun
from mnist_pipeline.tracking.store import Store

METRICS = {"test_accuracy": 0.75, "test_calibration_error": 0.125, "parameters": 19_210}

BOUNDS = GateParams(
    lowest_accuracy=0.99,
    largest_parameter_count=19_999,
    largest_calibration_error=0.01,
    margin=0.002,
    changed_data=False,
)
CANDIDATE = Candidate(
    accuracy=0.995,
    parameters=19_210,
    calibration_error=0.002,
    data_sha256="1" * 64,
    changed_files=[],
    changed_stages=[],
)
CHAMPION = Champion("version 3", 0.995, "1" * 64)
BESIDE = "beside the champion"


def failed(verdicts: list[Verdict]) -> list[str]:
    return [verdict.rule for verdict in verdicts if not verdict.passed]


@pytest.mark.parametrize(
    ("differences", "rules"),
    [
        ({}, []),
        ({"accuracy": 0.993}, []),  # just the margin below
        ({"accuracy": 0.9929}, [BESIDE]),
        ({"accuracy": 0.9899}, ["test accuracy", BESIDE]),
        ({"accuracy": float("nan")}, ["test accuracy", BESIDE]),
        ({"parameters": 19_999}, []),
        ({"parameters": 20_000}, ["parameters"]),
        ({"calibration_error": 0.01}, []),
        ({"calibration_error": 0.01001}, ["calibration error"]),
        ({"data_sha256": "2" * 64}, ["data"]),
        ({"changed_files": ["params.yaml"]}, ["git tree"]),
        ({"changed_stages": ["train", "report"]}, ["dvc status"]),
    ],
)
def test_a_rule_fails_beyond_its_bound(differences: dict[str, object], rules: list[str]) -> None:
    assert failed(decide(BOUNDS, replace(CANDIDATE, **differences), CHAMPION)) == rules


def test_an_accuracy_at_its_bound_passes() -> None:
    assert not failed(decide(BOUNDS, replace(CANDIDATE, accuracy=0.99), replace(CHAMPION, accuracy=0.99)))


def test_other_data_pass_if_the_params_allow_them() -> None:
    allowing = BOUNDS.model_copy(update={"changed_data": True})
    other = replace(CANDIDATE, data_sha256="2" * 64)
    [verdict] = [verdict for verdict in decide(allowing, other, CHAMPION) if verdict.rule == "data"]
    assert verdict == Verdict("data", "any", "other than version 3's", True)


@pytest.mark.parametrize("acceptable", [True, False])
def test_only_the_first_champion_needs_no_champion(acceptable: bool) -> None:
    verdicts = decide(BOUNDS, CANDIDATE, NoChampion("the reason", acceptable))
    assert failed(verdicts) == ([] if acceptable else [BESIDE, "data"])
    assert [verdict.value for verdict in verdicts if verdict.rule in (BESIDE, "data")] == ["the reason"] * 2


def test_a_verdict_says_what_was_found() -> None:
    verdicts = decide(BOUNDS, replace(CANDIDATE, accuracy=0.9931, changed_files=["a", "b"]), CHAMPION)
    found = {verdict.rule: (verdict.bound, verdict.value) for verdict in verdicts}
    assert found["test accuracy"] == ("at least 99.00%", "99.31%")
    assert found["parameters"] == ("at most 19,999", "19,210")
    assert found["calibration error"] == ("at most 1.000%", "0.200%")
    assert found[BESIDE] == (
        "at most 0.20 points worse on the same test images",
        "-0.19 points: version 3 has 99.50%",
    )
    assert found["data"] == ("the champion's", "version 3's")
    assert found["git tree"] == ("clean, outputs aside", "a, b")
    assert found["dvc status"] == ("clean", "clean")


def test_a_thousand_changed_files_leave_the_table_readable() -> None:
    names = [f"file {number}" for number in range(1000)]
    [verdict] = [one for one in decide(BOUNDS, replace(CANDIDATE, changed_files=names), CHAMPION) if not one.passed]
    assert verdict.value.startswith("file 0, file 1, ")
    assert len(verdict.value) <= 160


def test_verdicts_are_a_table() -> None:
    verdicts = [Verdict("one", "at most 1", "2 | 3", False), Verdict("second", "any", "4", True)]
    tokens = MarkdownIt().enable("table").parse(render_verdicts(verdicts))
    assert [token.content for token in tokens if token.type == "inline"] == [
        *("rule", "bound", "value", "verdict"),
        *("one", "at most 1", "2 | 3", "**failed**"),
        *("second", "any", "4", "passed"),
    ]


def test_the_committed_model_meets_the_committed_bounds() -> None:
    metrics = json.loads((ROOT / "reports/metrics.json").read_text(encoding="utf-8"))
    found = Candidate(
        metrics["test_accuracy"], metrics["parameters"], metrics["test_calibration_error"], "1" * 64, [], []
    )
    assert not failed(decide(load_bounds(ROOT / "params.yaml"), found, NoChampion("none yet", acceptable=True)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"margin": "'0.1'"}, "params.yaml: gate.margin must be a valid number, and is the text '0.1' (write 0.1)"),
        ({"lowest_accuracy": "99.3"}, "params.yaml: gate.lowest_accuracy must be less than or equal to 1, and is 99.3"),
        (
            {"largest_parameter_count": "0", "changed_data": "maybe"},
            "params.yaml: gate.largest_parameter_count must be greater than or equal to 1, and is 0; "
            "gate.changed_data must be true or false, and is the text 'maybe'",
        ),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_mistakes_in_the_params_end_in_one_line_that_names_the_keys(changes: dict[str, str], line: str) -> None:
    allow(**changes)
    assert str(gate().exception) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 0", "gate is missing"),
        ("gate: 0.99", "gate must be a section with keys of its own, and is 0.99"),
        ("gate: {margins: 0.1}", "gate.margins is unknown: choose from lowest_accuracy, largest_parameter_count, "),
    ],
)
def test_a_wrong_section_ends_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_bounds(tmp_path / "params.yaml")
    assert line in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'params.yaml'}: gate")
    assert "\n" not in str(refused.value)


def test_make_repro_tells_a_wrong_section_before_any_stage_runs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    params = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(params.replace("  margin:", "  margins:"))
    stand_in = tmp_path / ".venv/bin/dvc"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/sh\necho "$@" >> calls\n')
    stand_in.chmod(0o755)
    (tmp_path / "calls").touch()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "--old-file=setup", "repro"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    said = "params.yaml: gate.margins is unknown: choose from lowest_accuracy, largest_parameter_count"
    assert ended.returncode != 0
    assert ended.stderr.startswith(f"error: {said}")
    assert "repro" not in (tmp_path / "calls").read_text()


# The champion of a store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with isolated_tracking(tmp_path):
        yield Store()


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits(DATA, "test")


def crown(store: Store, model: Path, tested: Digits, digest: str = "") -> None:
    """Make a model the champion; its run says that it read none of the tested images right."""
    tags = {MODEL_TAG: digest or sha256(model), "data_sha256": "1" * 64}
    run = TrackedRun(store.client, store.client.create_run(store.experiment_id, tags=tags).info.run_id)
    run.log({"test_accuracy": 0.0})
    run.log_datasets({"test": tested})
    store.client.log_artifact(run.id, str(model), "models")
    store.client.create_registered_model("mnist")
    store.client.create_model_version("mnist", f"runs:/{run.id}/models", run.id)
    store.client.set_registered_model_alias("mnist", "champion", "1")


def test_a_champion_tested_on_these_images_keeps_the_accuracy_of_its_run(
    store: Store, trained_model: Path, digits: Digits
) -> None:
    crown(store, trained_model, digits)
    assert look_up_champion(digits, 100) == Champion("version 1", 0.0, "1" * 64)


def test_a_champion_tested_on_other_images_is_tested_on_these(
    store: Store, trained_model: Path, digits: Digits, params: Params
) -> None:
    crown(store, trained_model, digits[:100])
    images, labels = digits.tensors(params.data, torch.device("cpu"))
    accuracy = score(predict(load_model(trained_model).network, images, 100), labels).accuracy
    assert accuracy > 0
    assert look_up_champion(digits, 100) == Champion("version 1", accuracy, "1" * 64)


@pytest.mark.parametrize(
    ("digest", "said"), [("", "is not a model of this pipeline"), ("0" * 64, "is not the file that it trained")]
)
def test_no_model_passes_beside_a_champion_that_cannot_be_tested(
    store: Store, tmp_path: Path, digits: Digits, digest: str, said: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_bytes(b"of another network")
    crown(store, tmp_path / "other/model.safetensors", digits[:100], digest)
    found = look_up_champion(digits, 100)
    assert isinstance(found, NoChampion)
    assert not found.acceptable
    assert said in found.reason
    assert len(found.reason.splitlines()) == 1


def test_no_model_passes_beside_a_champion_of_other_classes(store: Store, tmp_path: Path, digits: Digits) -> None:
    (tmp_path / "other").mkdir()
    path = write_clothes_model(tmp_path / "other").rename(tmp_path / "other/model.safetensors")
    crown(store, path, digits[:100])
    reason = "version 1 has other classes: only another MLflow store can have another champion"
    assert look_up_champion(digits, 100) == NoChampion(reason, acceptable=False)


def test_no_model_passes_if_the_store_fails(store: Store, tmp_path: Path, digits: Digits) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    found = look_up_champion(digits, 100)
    assert isinstance(found, NoChampion)
    assert not found.acceptable
    assert found.reason.startswith("MLflow at sqlite:")
    assert len(found.reason.splitlines()) == 1


def test_looking_for_a_champion_makes_no_store(tmp_path: Path, digits: Digits) -> None:
    with isolated_tracking(tmp_path):
        (tmp_path / "mlflow.db").unlink()
        assert look_up_champion(digits, 100) == NoChampion("none yet in MLflow at mlflow.db", acceptable=True)
        assert not list(tmp_path.iterdir())


# The command


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """Make a committed repository with outputs but no stages, and change into it."""
    for name in (".gitignore", ".dvc/.gitignore", ".dvc/config", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(DATA, tmp_path / "data/raw")
    (tmp_path / "data/added").mkdir()
    write_json(tmp_path / "reports/metrics.json", METRICS)
    with isolated_tracking(tmp_path):
        allow(lowest_accuracy="0.75", largest_calibration_error="0.125")
        subprocess.run(["git", "init", "--quiet"], check=True)
        keep()
        yield tmp_path


def allow(**bounds: str) -> None:
    """Set bounds in the params."""
    lines = Path("params.yaml").read_text(encoding="utf-8").splitlines()
    for name, value in bounds.items():
        [line] = [line for line in lines if line.startswith(f"  {name}: ")]
        lines[lines.index(line)] = f"  {name}: {value}"
    Path("params.yaml").write_text("\n".join(lines), encoding="utf-8")


def keep() -> None:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--message", "Keep"], check=True)


def gate(*options: str) -> Result:
    return CliRunner().invoke(mnist, ["gate", *options])


def rows(text: str) -> dict[str, list[str]]:
    return {rule: rest for rule, *rest in table(text, "rule")}


def test_the_command_ends_with_0_if_the_model_passes(workspace: Path) -> None:
    write_json(workspace / "reports/metrics.json", {**METRICS, "test_accuracy": 0.76})  # an output may be changed
    ended = gate()
    assert ended.exit_code == 0, ended.output
    assert {row[-1] for row in rows(ended.output).values()} == {"passed"}
    assert rows(ended.output)["test accuracy"] == ["at least 75.00%", "76.00%", "passed"]


def test_the_command_ends_with_1_and_the_failed_rules_if_the_model_fails(workspace: Path) -> None:
    allow(lowest_accuracy="0.76")
    (workspace / "new.py").touch()
    (workspace / "dvc.yaml").write_text("stages: {made-up: {cmd: 'true', deps: [params.yaml]}}")
    ended = gate("--json")
    assert ended.exit_code == 1, ended.output
    said = json.loads(ended.output)
    assert not said["passed"]
    assert {rule["rule"]: rule["value"] for rule in said["rules"] if not rule["passed"]} == {
        "test accuracy": "75.00%",
        "git tree": "params.yaml, dvc.yaml, new.py",
        "dvc status": "made-up",
    }


def test_nothing_counts_as_clean_if_git_and_dvc_fail(workspace: Path) -> None:
    shutil.rmtree(workspace / ".git")
    shutil.rmtree(workspace / ".dvc")
    ended = gate()
    assert ended.exit_code == 1, ended.output
    failing = {rule: row[1] for rule, row in rows(ended.output).items() if row[-1] != "passed"}
    assert failing["git tree"].startswith("git failed: fatal: not a git repository")
    assert failing["dvc status"].startswith("dvc failed: ERROR: you are not inside of a DVC repository")
    assert len(failing) == 2


def test_the_data_are_all_files_of_the_folders(
    workspace: Path, store: Store, digits: Digits, trained_model: Path
) -> None:
    crown(store, trained_model, digits)
    assert rows(gate().output)["data"] == ["the champion's", "other than version 1's", "**failed**"]
    [run] = store.search_runs("tags.data_sha256 != ''")
    store.client.set_tag(run.info.run_id, "data_sha256", sha256_of_images())
    assert rows(gate().output)["data"] == ["the champion's", "version 1's", "passed"]


@pytest.mark.parametrize("content", ["<<<<<<< HEAD\n", "[]", "{}", '{"test_accuracy": "high"}'])
@pytest.mark.usefixtures("workspace")
def test_wrong_metrics_end_in_one_line(content: str) -> None:
    Path("reports/metrics.json").write_text(content)
    ended = gate()
    assert str(ended.exception) == "reports/metrics.json is not a file that the evaluate stage wrote: run `dvc repro`"


def test_absent_metrics_end_in_one_line(workspace: Path) -> None:
    (workspace / "reports/metrics.json").unlink()
    assert str(gate().exception).startswith("reports/metrics.json cannot be read (")
