"""Recipes: they fit the params, and DVC runs them as experiments."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import ROOT
from support.working_tree import git

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import load_params
from mnist_pipeline.experiments.recipes import find_recipe, run_experiment
from mnist_pipeline.model.network import build_model, count_parameters

RECIPES = sorted(file.stem for file in (ROOT / "experiments").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_the_params_and_keeps_to_the_parameter_budget(name: str) -> None:
    params = load_params(overlay=find_recipe(name))
    assert params != load_params()
    assert count_parameters(build_model(params.model, seed=0)) < params.model.parameter_budget


def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones() -> None:
    known = f"specification, {', '.join(RECIPES)}"
    with pytest.raises(UserError, match=f"experiments/worst.yaml is absent: the recipes are {known}"):
        find_recipe("worst")


def test_an_overlay_with_an_unknown_param_is_refused(tmp_path: Path) -> None:
    overlay = tmp_path / "odd.yaml"
    overlay.write_text("train:\n  epoch: 3\n")
    with pytest.raises(UserError, match=r"odd.yaml: train.epoch is unknown: choose from processes, epochs"):
        load_params(overlay=overlay)


def test_a_mistake_is_told_of_the_file_that_has_it(tmp_path: Path) -> None:
    params, overlay = tmp_path / "params.yaml", tmp_path / "short.yaml"
    params.write_text((ROOT / "params.yaml").read_text().replace("seed: 0", "seed: none"))
    overlay.write_text("train:\n  epochs: 3\n")
    with pytest.raises(UserError, match=r"params.yaml: seed must be a valid integer, and is the text 'none'"):
        load_params(params, overlay)


@pytest.fixture
def arguments_of_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which a stand-in for `dvc` writes its arguments, one on each line."""
    path, script = tmp_path / "arguments", tmp_path / "bin/dvc"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {path}\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    return path


def test_mnist_experiment_gives_dvc_the_recipe_and_then_its_own_arguments(arguments_of_dvc: Path) -> None:
    command = ["experiment", "tiny", "-S", "seed=4", "--queue"]
    ended = CliRunner().invoke(mnist, command, env={"MNIST_PARAMS": "seed=5"})
    assert ended.exit_code == 3  # as dvc's
    arguments = arguments_of_dvc.read_text().splitlines()
    assert arguments[:4] == ["exp", "run", "--name", "tiny"]
    assert "--set-param=model.channels=[4, 6, 7, 8, 8, 7]" in arguments
    assert "--set-param=model.bias=false" in arguments
    assert '--set-param=train.optimizer="muon"' in arguments
    assert arguments[-2:] == ["--set-param=seed=4", "--queue"]


@pytest.mark.parametrize("option", ["--temp", "--queue"])
def test_an_experiment_that_dvc_would_lose_in_a_shallow_clone_is_refused(
    option: str, arguments_of_dvc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    (origin / "experiments").mkdir(parents=True)
    (origin / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    git("init", "--quiet", directory=origin)
    for message in ("one", "two"):
        git("add", "--all", directory=origin)
        git("commit", "--quiet", "--allow-empty", "--message", message, directory=origin)
    git("clone", "--quiet", "--depth", "1", origin.as_uri(), str(clone))
    monkeypatch.chdir(clone)
    ended = CliRunner().invoke(mnist, ["experiment", "specification", option])
    assert isinstance(ended.exception, UserError)
    assert "first `git fetch --unshallow`" in str(ended.exception)
    assert not arguments_of_dvc.exists()
    CliRunner().invoke(mnist, ["experiment", "specification"])
    assert arguments_of_dvc.exists()


def test_params_in_the_environment_override_the_recipe(arguments_of_dvc: Path) -> None:
    variables = {"MNIST_PARAMS": "seed=4 train.epochs=1"}
    CliRunner().invoke(mnist, ["experiment", "specification"], env=variables)
    params = ["--set-param=seed=4", "--set-param=train.epochs=1"]
    assert arguments_of_dvc.read_text().splitlines() == ["exp", "run", "--name", "specification", *params]


@pytest.mark.parametrize("name", ["issue #1", "Zoë", "what?", "a%41"])
def test_an_experiment_in_a_copy_is_refused_below_a_directory_in_which_dvc_loses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(ROOT / "experiments", tmp_path / name / "experiments")
    shutil.copy(ROOT / "params.yaml", tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match="leave out the option, or rename the directory"):
        run_experiment("fast", ["--temp"])
