"""Predicting and scoring: the same answers whatever the batches and the network's mode."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import Tensor

from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.inference import predict, score, set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.model.networks.convolutional import Net


@pytest.fixture
def model(params: Params) -> Net:
    return build_model(params.model, seed=0)


@pytest.fixture
def images(small_data: Path, params: Params) -> Tensor:
    return load_digits(small_data, "test")[:12].tensors(params.data, torch.device("cpu"))[0]


def test_a_score_is_the_mean_negative_log_likelihood_and_the_right_images() -> None:
    probabilities = torch.full((4, 10), 0.05)
    probabilities[0, 7], probabilities[1, 0], probabilities[2, 3], probabilities[3, 9] = 0.5, 0.25, 0.8, 0.4
    scored = score(probabilities.log(), torch.tensor([7, 0, 3, 1]))  # three are right; the last gives its 1 0.05
    assert scored.loss == pytest.approx(-math.log(0.5 * 0.25 * 0.8 * 0.05) / 4)
    assert (scored.correct, scored.total, scored.accuracy) == (3, 4, 0.75)


@pytest.mark.parametrize("batch_size", [1, 5, 11, 1000])
def test_predictions_do_not_depend_on_the_batch_size(model: Net, images: Tensor, batch_size: int) -> None:
    expected = predict(model, images, batch_size=12)
    assert torch.allclose(predict(model, images, batch_size), expected, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_network_as_it_was(model: Net, images: Tensor, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predict(model, images, batch_size=12)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_predicting_is_in_evaluation_mode_whatever_the_networks_mode(model: Net, images: Tensor) -> None:
    expected = predict(model.eval(), images, batch_size=12)
    assert torch.equal(predict(model.train(), images, batch_size=12), expected)


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", False), ("DEFAULT", True), ("SVE256", True)])
def test_a_line_tells_when_the_last_bits_may_differ(
    capability: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    set_up_torch(torch.get_num_threads())
    said = capsys.readouterr().err
    assert said.count("\n") == warned
    assert ("the last bits of the results may differ" in said) == warned


def test_a_new_process_has_the_pinned_kernels_whatever_its_environment() -> None:
    program = "import mnist_pipeline, torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT / "src")}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == torch.backends.cpu.get_cpu_capability()
