"""Dropout and batch normalisation do what torch's do."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from mnist_pipeline.model.layers import BatchNorm2d, Dropout, Dropout2d


def run(layer: nn.BatchNorm2d, inputs: Tensor) -> list[Tensor]:
    """Return the output, the gradients and the running statistics of a layer in training."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, layer.num_features))
        layer.bias.copy_(torch.linspace(-1, 1, layer.num_features))
    inputs = inputs.clone().requires_grad_()
    output = layer(inputs)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = [output, inputs.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    return [tensor.detach() for tensor in found if tensor is not None]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(5, 6, 28, 28), (1, 3, 2, 1), (129, 24, 3, 3)])
def test_batch_normalisation_is_torchs(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    inputs = 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, torchs = BatchNorm2d(shape[1]), nn.BatchNorm2d(shape[1])
    found, expected = run(ours, inputs.contiguous(memory_format=memory_format)), run(torchs, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.eval()(inputs), torchs.eval()(inputs), atol=1e-4, rtol=1e-4)


def test_the_statistics_of_averaged_weights_are_the_mean_over_all_batches() -> None:
    batches = list(torch.randn(4, 5, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    ours, torchs = BatchNorm2d(3), nn.BatchNorm2d(3)
    for layer in (ours, torchs):
        update_bn(batches, layer)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("layer", [Dropout, Dropout2d])
def test_each_activation_is_dropped_with_probability_p(layer: type[Dropout], p: float) -> None:
    torch.manual_seed(0)
    factors = layer(p)(torch.ones(200, 50, 3, 3))
    assert factors.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    share = (factors == 0).double().mean(dim=(0, 2, 3))
    assert share.mean().item() == pytest.approx(p, abs=0.01)
    assert share.std() > 0


def test_activations_that_are_not_images_are_dropped_too() -> None:
    torch.manual_seed(0)
    assert 0.2 < (Dropout(0.25)(torch.ones(50, 40)) == 0).double().mean().item() < 0.3
