"""`dvc.yaml` tells the truth: each stage declares the folders, params and paths that its script uses, and no others."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from dvc.repo import Repo
from support import ROOT
from support.repository import Repository

from mnist_pipeline.common import paths
from mnist_pipeline.common.params import Params

PACKAGE = "src/mnist_pipeline"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
SCRIPTS = sorted((ROOT / "stages").glob("*.py"))
MAKERS = {"common", "data", "model", "training", "evaluation", "report"}
SECTIONS = set(Params.model_fields)
ARTIFACTS = {name: str(path) for name, path in vars(paths).items() if isinstance(path, Path)}
del ARTIFACTS["PARAMS"], ARTIFACTS["REPORTS"]  # the one is declared by section, the other is only a directory


def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def folders_behind(script: Path) -> set[str]:
    """Return the makers that a script imports, itself or through other makers."""
    imported = {node.module or "" for node in nodes_of(script) if isinstance(node, ast.ImportFrom)}
    folders = {name.split(".")[1] for name in imported if name.startswith("mnist_pipeline.")} & MAKERS
    graph = grimp.build_graph("mnist_pipeline", cache_dir=None)
    for folder in list(folders):
        upstream = graph.find_upstream_modules(f"mnist_pipeline.{folder}", as_package=True)
        folders |= {name.split(".")[1] for name in upstream if "." in name}
    return folders


def used_paths(script: Path) -> set[str]:
    """Return the script, the makers behind it, and the paths that it names."""
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in nodes_of(script)}
    return {
        f"stages/{script.name}",
        *(f"{PACKAGE}/{folder}" for folder in folders_behind(script)),
        *(path for name, path in ARTIFACTS.items() if name in names),
    }


def used_sections(script: Path) -> set[str]:
    """Return the sections of the params that a script reads; to pass the params on whole is to read all.

    `trace` is an exception: it takes those that the stage declares.
    """
    nodes = nodes_of(script)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    traced = [argument for call in calls if ast.unparse(call.func) == "trace" for argument in call.args]
    uses = [node for node in nodes if isinstance(node, ast.Name | ast.Attribute)]
    bare = [node for node in uses if isinstance(node, ast.Name) and node.id == "params"]
    read = [node for node in uses if isinstance(node, ast.Attribute) and node.value in bare]
    passed_on = [
        node for node in bare if isinstance(node.ctx, ast.Load) and node not in [*traced, *(use.value for use in read)]
    ]
    return SECTIONS if passed_on else {node.attr for node in read}


def declared_paths(stage: dict[str, Any]) -> set[str]:
    """Return what a stage depends on and makes; DVC writes an entry with options as a mapping of its path."""
    entries = [entry for kind in ("deps", "outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def script_of(stage: dict[str, Any]) -> Path:
    return ROOT / next(word for word in stage["cmd"].split() if word.endswith(".py"))


def named_paths(file: Path) -> Iterator[str]:
    """Find the text outside docstrings that names a file under data/, models/ or reports/."""
    nodes = nodes_of(file)
    documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {ast.get_docstring(node, clean=False) for node in documented}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            yield from re.findall(r"(?<![\w/])(?:data|models|reports)/\S*", node.value)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_just_the_paths_that_its_script_uses(name: str) -> None:
    assert declared_paths(STAGES[name]) == used_paths(script_of(STAGES[name]))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_just_the_params_that_its_script_reads(name: str) -> None:
    assert set(STAGES[name].get("params", [])) == used_sections(script_of(STAGES[name]))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_what_it_is_for(name: str) -> None:
    assert len(STAGES[name]["desc"].split()) > 2


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_needs_no_shell_and_takes_the_package_of_its_own_directory(name: str, tmp_path: Path) -> None:
    program, script = STAGES[name]["cmd"].split()
    assert program == "python"
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    (tmp_path / "src/mnist_pipeline").mkdir(parents=True)
    (tmp_path / "src/mnist_pipeline/__init__.py").write_text("raise SystemExit(__file__)")
    elsewhere = {variable: value for variable, value in os.environ.items() if variable != "PYTHONPATH"}
    command = [sys.executable, script]
    ended = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == str(tmp_path / "src/mnist_pipeline/__init__.py")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_thin(script: Path) -> None:
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 37


def test_every_script_is_a_stage() -> None:
    assert sorted(script_of(stage) for stage in STAGES.values()) == SCRIPTS


@pytest.mark.parametrize(
    "file", [*sorted((ROOT / PACKAGE).rglob("*.py")), *SCRIPTS], ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_one_module_alone_names_paths(file: Path) -> None:
    assert bool(list(named_paths(file))) == (file.name == "paths.py")


# What a change makes stale, by the real DVC; the stages that follow run again if their inputs come out different.

ALL = {"download", "train", "evaluate", "report"}
STALE = {
    "src/mnist_pipeline/common/files.py": ALL,
    "src/mnist_pipeline/data/digits.py": ALL,
    "src/mnist_pipeline/model/network.py": {"train", "evaluate", "report"},
    "src/mnist_pipeline/training/optimizer.py": {"train"},
    "src/mnist_pipeline/training/distributed/group.py": {"train"},
    "src/mnist_pipeline/evaluation/corruptions.py": {"evaluate", "report"},
    "src/mnist_pipeline/report/charts.py": {"report"},
    "src/mnist_pipeline/report/templates/report.md.j2": {"report"},
    "src/mnist_pipeline/tracking/run.py": set(),
    "src/mnist_pipeline/tracking/progress.py": set(),
    "src/mnist_pipeline/promotion/gate.py": set(),
    "src/mnist_pipeline/serving/service.py": set(),
    "src/mnist_pipeline/experiments/study.py": set(),
    "src/mnist_pipeline/cli.py": set(),
    "src/mnist_pipeline/__pycache__/new.pyc": set(),
    "src/mnist_pipeline/training/__pycache__/new.pyc": set(),
    "src/mnist_pipeline/training/.loop.py.swp": set(),
    "src/mnist_pipeline/training/loop.py~": set(),
    "src/mnist_pipeline/training/.DS_Store": set(),
    "src/mnist_pipeline/training/.ipynb_checkpoints/loop.py": set(),
    "benchmarks/bench.py": set(),
    "data/added/new/train-images-idx3-ubyte": {"train", "report"},
    "seed: 0": {"train", "report"},
    "threads: 1": {"train", "evaluate", "report"},
    "mean: 0.1307": {"train", "report"},
    "dropout: 0.25": {"train", "report"},
    "learning_rate: 0.001": {"train", "report"},
    "batch_size: 1000": {"evaluate", "report"},
    "gallery_size: 60": {"report"},
    "margin: 0.002": set(),
}


@pytest.fixture(scope="module")
def repository(trained: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return trained.copy(tmp_path_factory.mktemp("stale") / "repository")


@pytest.mark.pipeline
@pytest.mark.parametrize(("change", "stale"), STALE.items(), ids=STALE)
def test_a_change_makes_just_the_stages_stale_that_it_reaches(
    repository: Repository, change: str, stale: set[str]
) -> None:
    """`change` is a file that gets another line, or a param that gets another value."""
    is_param = ": " in change
    file = repository.root / ("params.yaml" if is_param else change)
    before = file.read_bytes() if file.exists() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        (before or b"").replace(change.encode(), f"{change}1".encode(), 1) if is_param else (before or b"") + b"\n"
    )
    try:
        assert file.read_bytes() != before
        with Repo(str(repository.root)) as dvc:
            assert {name.rpartition(":")[2] for name in dvc.status()} == stale
    finally:
        file.unlink() if before is None else file.write_bytes(before)
