"""Muon: orthogonal steps, the same as torch's for a matrix, for convolutions alone."""

import torch
from torch import nn

from mnist_pipeline.common.params import Params
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.optimizer import Muon, build_optimizers, orthogonalize


def test_an_orthogonal_matrix_maps_all_directions_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in [(16, 144), (144, 16), (10, 10)]]
    for matrix, found in zip(matrices, orthogonalize(matrices), strict=True):
        assert found.shape == matrix.shape
        assert torch.linalg.cond(matrix) > 1.5
        singular_values = torch.linalg.svdvals(found)
        assert singular_values.min() > (0.4 if matrix.shape[0] == matrix.shape[1] else 0.6)
        assert singular_values.max() < 1.3


def test_a_step_is_that_of_torchs_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 54, generator=generator)
    ours, torchs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.1, momentum=0.9),
        torch.optim.Muon([torchs], lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        gradient = torch.randn(16, 54, generator=generator)
        for weights, optimizer in zip((ours, torchs), optimizers, strict=True):
            weights.grad = gradient
            optimizer.step()
    moved = (torchs - start).norm()
    assert (ours - torchs).norm() < 0.02 * moved  # torch's multiplies in bfloat16


def test_the_filters_of_a_convolution_are_the_rows_of_a_matrix() -> None:
    matrix = nn.Parameter(torch.randn(16, 54, generator=torch.Generator().manual_seed(0)))
    filters = nn.Parameter(matrix.detach().clone().view(16, 6, 3, 3))
    matrix.grad = torch.randn(16, 54, generator=torch.Generator().manual_seed(1))
    filters.grad = matrix.grad.view(16, 6, 3, 3)
    Muon([matrix, filters], lr=0.1, weight_decay=0.0, momentum=0.9).step()
    assert torch.equal(filters.flatten(1), matrix)


def test_muon_steps_the_convolutions_and_adamw_the_rest(params: Params) -> None:
    model = build_model(params.model, seed=0)
    muon, adamw = build_optimizers(model, params.train.model_copy(update={"optimizer": "muon"}))
    taken = [
        {id(weight) for group in optimizer.param_groups for weight in group["params"]} for optimizer in (muon, adamw)
    ]
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert taken == [convolutions, {id(weight) for weight in model.parameters()} - convolutions]
