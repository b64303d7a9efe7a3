"""The file of a trained network: its weights (no pickle), its architecture and its normalisation."""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import check_file, write_bytes
from mnist_pipeline.common.params import ModelParams, Normalization
from mnist_pipeline.model.network import Net, count_parameters

_DESCRIPTION = "model"  # the key of the file's metadata
_MAX_BYTES = 1_000_000_000


@dataclass(frozen=True)
class TrainedModel:
    """A trained network, in evaluation mode, and how its images are normalised."""

    network: Net
    normalization: Normalization


def save_model(network: nn.Module, path: Path, params: ModelParams, normalization: Normalization) -> None:
    """Write a network's weights, its architecture and its normalisation as safetensors."""
    description = {
        "architecture": params.model_dump(),
        "normalization": {"mean": normalization.mean, "std": normalization.std},
        "parameters": count_parameters(network),
    }
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    # One key holds everything: safetensors writes several keys in an order that differs from call to call.
    write_bytes(path, safetensors.torch.save(weights, {_DESCRIPTION: json.dumps(description)}))


def load_model(path: Path) -> TrainedModel:
    """Build the network that a file of `save_model` describes, and load its weights.

    Raises:
        UserError: the file is absent or damaged, or holds another network.
    """
    try:
        check_file(path, _MAX_BYTES)
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()[_DESCRIPTION])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        network = Net(ModelParams.model_validate(description["architecture"]))
        network.load_state_dict(weights)
        normalization = Normalization.model_validate(description["normalization"])
    except FileNotFoundError:
        raise UserError(f"{path} is absent: `make repro` makes it, `dvc pull` brings it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a model of this pipeline ({' '.join(str(error).split())})") from None
    return TrainedModel(network.eval(), normalization)
