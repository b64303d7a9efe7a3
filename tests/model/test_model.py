"""The network: the specification's layers and numbers, and a file that carries all that it takes to use it again."""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from support import ROOT
from torch import Tensor

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params
from mnist_pipeline.model.architecture import Layer, list_layers
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model, save_model
from mnist_pipeline.model.network import build_model, count_parameters
from mnist_pipeline.model.networks.convolutional import Net

PARAMETERS = {
    "conv1": 60,
    "bn1": 12,
    "conv2": 550,
    "bn2": 20,
    "conv3": 1456,
    "bn3": 32,
    "conv4": 2610,
    "bn4": 36,
    "conv5": 5216,
    "bn5": 64,
    "conv6": 6936,
    "bn6": 48,
    "conv7": 2170,
}


@pytest.fixture
def model(params: Params) -> Net:
    return build_model(params.model, seed=0)


@pytest.fixture
def layers(model: Net) -> dict[str, Layer]:
    return {layer.name: layer for layer in list_layers(model)}


@pytest.fixture
def saved(model: Net, params: Params, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model.safetensors", params.model, params.data)
    return tmp_path / "model.safetensors"


def test_each_layer_has_the_specifications_parameters(layers: dict[str, Layer]) -> None:
    assert {name: layer.parameters for name, layer in layers.items() if layer.parameters} == PARAMETERS


def test_the_network_has_19210_parameters(model: Net, layers: dict[str, Layer]) -> None:
    assert sum(layer.parameters for layer in layers.values()) == 19_210
    assert count_parameters(model) == 19_210


@pytest.mark.parametrize(("block", "shape"), [("block1", (10, 14, 14)), ("block2", (18, 7, 7)), ("block3", (10,))])
def test_each_block_ends_with_the_specifications_shape(
    layers: dict[str, Layer], block: str, shape: tuple[int, ...]
) -> None:
    assert [layer.output_shape for layer in layers.values() if layer.block == block][-1] == shape


def test_each_layer_takes_what_the_one_before_gives(layers: dict[str, Layer]) -> None:
    outputs = [layer.output_shape for layer in layers.values()]
    assert [layer.input_shape for layer in layers.values()] == [(1, 28, 28), *outputs[:-1]]


def test_channels_and_sides_are_the_specifications(layers: dict[str, Layer]) -> None:
    assert {name: layer.output_shape for name, layer in layers.items() if name.startswith("conv")} == {
        "conv1": (6, 28, 28),
        "conv2": (10, 28, 28),
        "conv3": (16, 14, 14),
        "conv4": (18, 14, 14),
        "conv5": (32, 5, 5),
        "conv6": (24, 3, 3),
        "conv7": (10, 1, 1),
    }


@pytest.mark.parametrize(("name", "padding"), [("conv1", 1), ("conv4", 1), ("conv5", 0), ("conv7", 0)])
def test_kernels_and_padding_are_the_specifications(layers: dict[str, Layer], name: str, padding: int) -> None:
    assert (layers[name].kernel, layers[name].padding) == (3, padding)


@pytest.mark.parametrize(("name", "side"), [("conv2", 5), ("pool1", 6), ("conv4", 14), ("pool2", 16), ("conv5", 24)])
def test_a_receptive_field_is_the_square_of_pixels_that_reach_an_output(
    model: Net, layers: dict[str, Layer], name: str, side: int
) -> None:
    modules = {name: module for block in model.eval().children() for name, module in block.named_children()}
    activation = torch.zeros(28 * 28, 1, 28, 28)
    activation.view(28 * 28, -1).fill_diagonal_(torch.nan)  # image i spoils pixel i, and all that depends on it
    with torch.inference_mode():
        for module_name, module in modules.items():
            activation = module(activation)
            if module_name == name:
                break
    middle = activation.shape[-1] // 2
    reached = activation[:, 0, middle, middle].isnan().view(28, 28)
    assert (reached.any(dim=0).sum(), reached.any(dim=1).sum(), reached.sum()) == (side, side, side**2)
    assert layers[name].receptive_field == side


def test_the_last_convolution_sees_the_whole_image(layers: dict[str, Layer]) -> None:
    assert layers["conv7"].receptive_field == 28


def test_describing_leaves_the_network_as_it_was(model: Net) -> None:
    before = {name: tensor.clone() for name, tensor in model.train().state_dict().items()}
    list_layers(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("count", [1, 3])
def test_the_outputs_are_log_probabilities(model: Net, count: int) -> None:
    log_probabilities = predict(model, torch.randn(count, 1, 28, 28), batch_size=count)
    assert log_probabilities.shape == (count, 10)
    assert log_probabilities.exp().sum(dim=1).tolist() == pytest.approx(count * [1.0])


@pytest.mark.parametrize(
    ("name", "expected"), [("relu", [0.0, 0.0, 2.0]), ("silu", [-0.2689, 0.0, 2 / (1 + math.exp(-2))])]
)
def test_every_convolution_but_the_last_is_activated_as_the_params_say(
    params: Params, name: str, expected: list[float]
) -> None:
    net = build_model(params.model.model_copy(update={"activation": name}), seed=0)
    modules = [
        module for block in net.children() for layer, module in block.named_children() if layer.startswith("activation")
    ]
    assert len(modules) == 6
    for module in modules:
        assert module(torch.tensor([-1.0, 0.0, 2.0])).tolist() == pytest.approx(expected, abs=1e-4)


def dropped(params: Params, kind: str, training: bool) -> Tensor:
    """Return ones (64, 18, 7, 7) as the second block's dropout lets them pass."""
    model = build_model(params.model.model_copy(update={"dropout_kind": kind}), seed=0).train(training)
    passed: Tensor = model.get_submodule("block2.dropout2")(torch.ones(64, 18, 7, 7))
    return passed


@pytest.mark.parametrize("kind", ["element", "channel"])
def test_dropout_zeroes_a_quarter_and_scales_the_rest(params: Params, kind: str) -> None:
    activation = dropped(params, kind, training=True)
    assert activation.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (activation == 0).double().mean().item() == pytest.approx(0.25, abs=0.05)


def test_element_dropout_zeroes_single_activations_and_channel_dropout_whole_maps(params: Params) -> None:
    whole = {kind: dropped(params, kind, training=True).std(dim=(2, 3)) == 0 for kind in ("element", "channel")}
    assert not whole["element"].any()
    assert whole["channel"].all()


@pytest.mark.parametrize("kind", ["element", "channel"])
def test_dropout_rests_in_evaluation(params: Params, kind: str) -> None:
    assert dropped(params, kind, training=False).unique().tolist() == [1]


@pytest.mark.parametrize("budget", [19_210, 1000])
def test_a_network_that_is_not_under_the_budget_is_refused(params: Params, budget: int) -> None:
    with pytest.raises(UserError, match=rf"19,210 .* model\.parameter_budget \({budget:,}\)") as refused:
        build_model(params.model.model_copy(update={"parameter_budget": budget}), seed=0)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("channels", [20_000, 1_000_000])
def test_a_network_that_no_machine_could_hold_is_refused_at_once(params: Params, channels: int) -> None:
    with pytest.raises(UserError, match=r"the network has [\d,]{14,} parameters"):
        build_model(params.model.model_copy(update={"channels": [channels] * 6}), seed=0)


def test_a_budget_of_one_parameter_more_is_enough(params: Params) -> None:
    model = build_model(params.model.model_copy(update={"parameter_budget": 19_211}), seed=0)
    assert count_parameters(model) == 19_210


def test_the_weights_depend_on_the_seed_alone(params: Params) -> None:
    weights = build_model(params.model, seed=7).state_dict()
    torch.manual_seed(99)
    again, other = build_model(params.model, seed=7).state_dict(), build_model(params.model, seed=8).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert not torch.equal(weights["block1.conv1.weight"], other["block1.conv1.weight"])


def test_a_loaded_model_predicts_the_same_bits(model: Net, params: Params, tmp_path: Path) -> None:
    model.train()(torch.randn(8, 1, 28, 28))  # moves the running statistics, which the file carries too
    save_model(model, tmp_path / "models" / "model", params.model, params.data)
    images = torch.randn(5, 1, 28, 28)
    loaded = load_model(tmp_path / "models" / "model").network
    assert torch.equal(predict(loaded, images, batch_size=5), predict(model, images, batch_size=5))


def test_a_loaded_model_is_ready_to_predict(saved: Path, params: Params) -> None:
    loaded = load_model(saved)
    assert not loaded.network.training
    assert (loaded.normalization.mean, loaded.normalization.std) == (params.data.mean, params.data.std)


@pytest.mark.parametrize("kind", ["element", "channel"])
def test_a_loaded_model_has_the_architecture_it_was_saved_with(params: Params, tmp_path: Path, kind: str) -> None:
    architecture = params.model.model_copy(update={"dropout_kind": kind, "dropout": 0.125})
    save_model(build_model(architecture, seed=0), tmp_path / "model", architecture, params.data)
    dropout = load_model(tmp_path / "model").network.get_submodule("block1.dropout1")
    assert type(dropout).__name__ == {"element": "Dropout", "channel": "Dropout2d"}[kind]
    assert dropout.p == 0.125


def test_the_file_says_how_to_build_and_feed_the_network(saved: Path) -> None:
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = " ".join(file.metadata().values())
    for fragment in (
        '"dropout": 0.25',
        '"dropout_kind": "element"',
        '"parameter_budget": 20000',
        '"mean": 0.1307',
        '"std": 0.3081',
        "19210",
    ):
        assert fragment in metadata


def test_the_same_weights_are_saved_as_the_same_bytes_in_every_process(saved: Path) -> None:
    program = """
import sys
from pathlib import Path
from mnist_pipeline.common.files import sha256
from mnist_pipeline.model.model_file import save_model
from mnist_pipeline.model.network import build_model
from mnist_pipeline.common.params import load_params

params, path = load_params(), Path(sys.argv[1])
for _ in range(8):
    save_model(build_model(params.model, 0), path, params.model, params.data)
    print(sha256(path))
"""
    other = subprocess.run(
        [sys.executable, "-c", program, saved.with_name("other")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(other.stdout.split()) == {hashlib.sha256(saved.read_bytes()).hexdigest()}


def resaved(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    """Change the weights of a saved model and leave what it says of itself."""

    def spoil(path: Path) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        path.write_bytes(safetensors.torch.save(change(safetensors.torch.load(path.read_bytes())), metadata))

    return spoil


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def replaced_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILED = {
    "absent": Path.unlink,
    "empty": written(b""),
    "text file": written(b"weights:\n  none\n"),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "without metadata": written(safetensors.torch.save({"weight": torch.zeros(2, 2)})),
    "of other metadata": written(safetensors.torch.save({"weight": torch.zeros(2, 2)}, {"format": "pt"})),
    "lacking a layer": resaved(lambda weights: {n: w for n, w in weights.items() if "conv7" not in n}),
    "with a layer too many": resaved(lambda weights: weights | {"block3.conv8.bias": torch.zeros(10)}),
    "with a layer of another shape": resaved(lambda weights: weights | {"block3.conv7.bias": torch.zeros(11)}),
    "directory": replaced_by_a_directory,
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_file_that_is_no_model_is_refused_in_one_line(saved: Path, spoil: Callable[[Path], object]) -> None:
    spoil(saved)
    with pytest.raises(UserError) as refused:
        load_model(saved)
    assert str(refused.value).startswith(str(saved))
    assert len(str(refused.value).splitlines()) == 1
