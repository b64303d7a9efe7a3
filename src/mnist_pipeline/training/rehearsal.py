"""Begin a training only after everything that the stages do with its network has worked on a few images."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import DataParams, ModelParams, TrainParams
from mnist_pipeline.model.architecture import list_layers
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model, save_model
from mnist_pipeline.model.network import build_model, network_errors
from mnist_pipeline.training.loop import Training, start_training, train

_TOLERANCE = 1e-4  # nats: how far two computations of a log-probability may differ


def prepare_training(
    digits: tuple[Tensor, Tensor], data: DataParams, model: ModelParams, params: TrainParams, seed: int
) -> Training:
    """Return the training that the params describe, before its first epoch, after a rehearsal with a copy.

    `digits` are the normalised images (N, 1, 28, 28) and labels (N,) that it will train on, on its device.

    Raises:
        UserError: the network is too large, or something that a stage does with it fails.
    """
    network = build_model(model, seed, len(data.classes)).to(digits[0].device)
    size = params.batch_size + len(digits[1]) % params.batch_size  # a batch, and one as small as an epoch's last
    images, labels = (part[:size] for part in digits)
    with network_errors(model.network):
        tested = _rehearse(network, (images, labels), len(data.classes), params)
        list_layers(tested)
        with tempfile.TemporaryDirectory() as directory:
            save_model(tested, path := Path(directory) / "model", model, data)
            loaded = load_model(path).network
        batch = torch.export.Dim("batch")
        torch.export.export(loaded, (images[:2].cpu(),), dynamic_shapes=({0: batch},))  # as MLflow does
    return start_training(network, params)


def _rehearse(network: nn.Module, digits: tuple[Tensor, Tensor], classes: int, params: TrainParams) -> nn.Module:
    """Check what a network answers, train a copy of it for an epoch of these few digits, and return the copy."""
    images, labels = digits
    found, alone = (predict(network, images[:2], batch_size) for batch_size in (2, 1))
    if found.shape != (len(found), classes) or not found.logsumexp(dim=1).abs().max() < _TOLERANCE:
        raise UserError(
            f"the network must return log-probabilities (images, {classes}): end forward with F.log_softmax(…, dim=1)"
        )
    if not torch.allclose(alone, found, atol=_TOLERANCE):
        raise UserError("the network must answer each image by itself, but it looks at the others of a batch")
    one_epoch = params.model_copy(update={"epochs": 1, "learning_rate": 1e-6})
    training = start_training(copy.deepcopy(network), one_epoch)
    list(train(training, digits, (images[:2], labels[:2]), one_epoch, seed=0))
    return training.network
