"""`mnist info`: the network layer by layer, and the file that holds it."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import ROOT
from support.clothes import CLOTHES, write_clothes_model

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256


def mnist_info(*arguments: str) -> Result:
    return CliRunner().invoke(mnist, ["info", *arguments])


def test_it_shows_every_layer_in_a_table(trained_model: Path) -> None:
    result = mnist_info("--model", str(trained_model))
    lines = result.stdout.splitlines()
    assert (result.exit_code, lines[0]) == (0, f"{trained_model}: SHA-256 {sha256(trained_model)}")
    assert lines[1] == "Pixels (0 to 1) are normalised: minus the mean 0.1307, divided by 0.3081."
    table = lines[3:]
    cells = [re.split(r" {2,}", line) for line in table]
    assert cells[0] == ["layer", "kind", "output", "parameters", "receptive field"]
    assert ["block1.conv2", "Conv2d", "10×28×28", "550", "5"] in cells
    assert ["block2.pool2", "MaxPool2d", "18×7×7", "0", "16"] in cells
    assert cells[-1] == ["total", "19,210"]
    assert len(cells) == 27
    edge = table[0].index("parameters") + len("parameters")
    assert all(re.search(r"\d$", line[:edge]) for line in table[1:])  # numbers end under the end of their heading


def test_it_is_json_for_programs(trained_model: Path) -> None:
    description = json.loads(mnist_info("--json", "--model", str(trained_model)).stdout)
    assert (description["model"], description["sha256"]) == (str(trained_model), sha256(trained_model))
    assert description["normalization"] == {"mean": 0.1307, "std": 0.3081}
    assert description["parameters"] == sum(layer["parameters"] for layer in description["layers"]) == 19_210
    assert description["layers"][0] == {
        "block": "block1",
        "name": "conv1",
        "kind": "Conv2d",
        "input_shape": [1, 28, 28],
        "output_shape": [6, 28, 28],
        "kernel": 3,
        "padding": 1,
        "parameters": 60,
        "receptive_field": 3,
    }


@pytest.fixture
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory has params and no model."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("untrained")
def test_without_a_model_it_shows_the_network_of_the_params() -> None:
    lines = mnist_info().stdout.splitlines()
    assert lines[0] == "models/model.safetensors is absent: this is the network of params.yaml, untrained"
    assert re.split(r" {2,}", lines[-1]) == ["total", "19,210"]
    description = json.loads(mnist_info("--json").stdout)
    assert (description["model"], description["sha256"], description["parameters"]) == (None, None, 19_210)


@pytest.mark.usefixtures("untrained")
def test_a_network_of_the_params_that_is_not_under_the_budget_is_an_error() -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("[6, ", "[1000000, "))
    assert "which is not under model.parameter_budget (20,000)" in str(mnist_info().exception)


@pytest.mark.usefixtures("untrained")
def test_another_model_that_is_absent_is_an_error() -> None:
    result = mnist_info("--model", "other.safetensors")
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("other.safetensors is absent")


def test_it_names_other_classes_than_the_digits(tmp_path: Path, trained_model: Path) -> None:
    path = write_clothes_model(tmp_path)
    assert f"It tells apart {', '.join(CLOTHES)}." in mnist_info("--model", str(path)).stdout.splitlines()
    assert "tells apart" not in mnist_info("--model", str(trained_model)).stdout
    assert json.loads(mnist_info("--json", "--model", str(path)).stdout)["classes"] == CLOTHES
