"""Any module is a network: the params name its file, its class says what it takes, and its layers can be listed."""

from pathlib import Path

import pytest
import torch
from support import ROOT
from support.networks import network_file
from torch import nn
from torch.nn import functional as F

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import load_params
from mnist_pipeline.model.architecture import group_into_steps, list_layers
from mnist_pipeline.model.model_file import load_model, save_model
from mnist_pipeline.model.network import build_model, count_parameters

NET = """
class _Helper(nn.Module):
    pass

class Net(nn.Module):
    def __init__(self, classes: int, width: int, scale: float = 0.5):
        super().__init__()
        self.last = nn.Linear(width, classes)
        self.scale = scale
"""


def write_params(directory: Path, model: str) -> Path:
    """Write the real params with another section `model`."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    before, _, after = text.partition("\nmodel:\n")
    path = directory / "params.yaml"
    path.write_text(f"{before}\nmodel: {model}\n\ntrain:\n{after.partition('train:')[2]}", encoding="utf-8")
    return path


def test_the_params_are_those_that_its_class_takes(tmp_path: Path) -> None:
    with network_file(tmp_path, NET):
        params = load_params(write_params(tmp_path, "{network: mine, width: 12, parameter_budget: 1000}"))
        assert params.model.model_dump() == {"network": "mine", "parameter_budget": 1000, "width": 12, "scale": 0.5}
        network = build_model(params.model, seed=0, classes=7)
        assert network.last.weight.shape == (7, 12)


WRONG = {
    "no such network": ("{network: nine, parameter_budget: 9}", "model.network must be convolutional or mine, and is"),
    "a path": ("{network: ../mine, parameter_budget: 9}", "model.network must be convolutional or mine"),
    "no network": ("{width: 1, parameter_budget: 9}", "model.network is missing"),
    "a number": ("{network: 5, parameter_budget: 9}", "model.network must be a valid string, and is 5"),
    "a param missing": ("{network: mine, parameter_budget: 9}", "model.width is missing"),
    "a wrong type": ("{network: mine, width: wide, parameter_budget: 9}", "model.width must be a valid integer"),
    "another network's param": (
        "{network: mine, width: 1, bias: true, parameter_budget: 9}",
        "model.bias is unknown: choose from network, parameter_budget, width, scale",
    ),
}


@pytest.mark.parametrize(("model", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_section_is_refused_in_one_line(tmp_path: Path, model: str, reason: str) -> None:
    with network_file(tmp_path, NET), pytest.raises(UserError) as refused:
        load_params(write_params(tmp_path, model))
    assert reason in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


BROKEN = {
    "not Python": ("class Net(nn.Module:\n    pass\n", "mine.py, line 4: SyntaxError"),
    "an error": ("\n\n1 / 0\n", "mine.py, line 6: ZeroDivisionError: division by zero"),
    "an absent package": ("import nowhere_to_be_found\n", "mine.py, line 4: ModuleNotFoundError"),
    "another name": ("class Mine(nn.Module): pass\n", "has no attribute 'Net'"),
}


@pytest.mark.parametrize(("body", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, body: str, reason: str) -> None:
    with network_file(tmp_path, body), pytest.raises(UserError) as refused:
        load_params(write_params(tmp_path, "{network: mine, parameter_budget: 9}"))
    assert reason in str(refused.value)


def test_a_class_that_refuses_its_params_is_named(tmp_path: Path) -> None:
    with network_file(tmp_path, NET), pytest.raises(UserError, match=r"mine\.py, line 11: "):
        build_model(load_params(write_params(tmp_path, "{network: mine, width: -1, parameter_budget: 9}")).model, 0)


def test_a_model_file_brings_network_and_classes_back(tmp_path: Path) -> None:
    with network_file(tmp_path, NET):
        params = load_params(write_params(tmp_path, "{network: mine, width: 4, parameter_budget: 99}"))
        data = params.data.model_copy(update={"classes": ["Coat", "Dress"]})
        network = build_model(params.model, seed=0, classes=2)
        save_model(network, tmp_path / "model", params.model, data)
        loaded = load_model(tmp_path / "model")
        assert loaded.classes == ["Coat", "Dress"]
        assert torch.equal(loaded.network.last.weight, network.last.weight)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return F.relu(self.scale * self.conv(maps) + self.shortcut(maps))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.stages = nn.ModuleList([nn.Sequential(Block(4, 6)), nn.Sequential(Block(6, 8))])
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        return F.log_softmax(self.head(F.max_pool2d(maps, 7).flatten(1)), dim=1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.patches = nn.Conv2d(1, 8, (7, 14), (7, 14))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        return F.log_softmax(self.head(self.attention(tokens, tokens, tokens)[0][:, 0]), dim=1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(28, 8, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.head(self.rows(images[:, 0])[0][:, -1]), dim=1)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.activation, self.head = nn.Conv2d(1, 1, 3, dilation=2), nn.ReLU(), nn.Linear(400, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.activation(self.conv(self.activation(self.conv(images))))
        return F.log_softmax(self.head(maps.flatten(1)), dim=1)


MLP = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10), nn.LogSoftmax(1))
SEEN = {  # the receptive field of each layer
    "a perceptron": (MLP, {"0": 1, "1": 28, "2": 28, "3": 28, "4": 28}),
    "residual blocks": (
        Residual(),
        {
            "stem": 3,
            "stages.0.0": 5,
            "stages.0.0.conv": 5,
            "stages.0.0.shortcut": 3,
            "stages.1.0": 9,
            "stages.1.0.conv": 9,
            "stages.1.0.shortcut": 5,
            "head": 28,
        },
    ),
    "attention": (Attention(), {"Attention": 28, "patches": "7×14", "attention": 28, "head": 28}),
    "a recurrent network": (Recurrent(), {"rows": "15×28", "head": 28}),
    "modules used twice": (Reused(), {"conv": 9, "activation": 9, "head": 28}),
}


@pytest.mark.parametrize(("network", "seen"), SEEN.values(), ids=SEEN)
def test_the_layers_of_any_module_are_listed(network: nn.Module, seen: dict[str, object]) -> None:
    layers = list_layers(network)
    assert {layer.path: layer.receptive_field for layer in layers} == seen
    assert sum(layer.parameters for layer in layers) == count_parameters(network)
    assert layers[-1].output_shape == (10,)
    steps = [step for _, steps in group_into_steps(layers) for step in steps]
    assert [layer for step in steps for layer in step] == layers


def test_frozen_weights_are_not_counted() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Linear(4, 10))
    network[1].requires_grad_(False)
    assert [layer.parameters for layer in list_layers(network)] == [0, 0, 50]
    assert count_parameters(network) == 50
