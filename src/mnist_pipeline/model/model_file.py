"""The file of a trained network: its weights (no pickle), its architecture, its normalisation, and its classes."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import check_file, write_bytes
from mnist_pipeline.common.params import DataParams, ModelParams, Normalization
from mnist_pipeline.data.digits import DIGITS
from mnist_pipeline.model.network import count_parameters, make_network, network_params

_DESCRIPTION = "model"  # the key of the file's metadata
_UNSAID = {"network": "convolutional", "classes": DIGITS}  # what holds for a file that says nothing else
_MAX_BYTES = 1_000_000_000


@dataclass(frozen=True)
class TrainedModel:
    """A trained network, in evaluation mode, how its images are normalised, and the names of its classes."""

    network: nn.Module
    normalization: Normalization
    classes: list[str] = field(default_factory=DIGITS.copy)


def save_model(network: nn.Module, path: Path, params: ModelParams, data: DataParams) -> None:
    """Write a network's weights, its architecture, its normalisation and its classes as safetensors."""
    said = {"network": params.network, "classes": data.classes}
    architecture = params.model_dump(exclude={"network", "parameter_budget"})
    description = {
        "architecture": architecture | {"parameter_budget": params.parameter_budget},
        "normalization": {"mean": data.mean, "std": data.std},
        "parameters": count_parameters(network),
        **{name: value for name, value in said.items() if value != _UNSAID[name]},
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
            description = _UNSAID | json.loads(file.metadata()[_DESCRIPTION])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        name, classes = description["network"], description["classes"]
        params = network_params(name).model_validate(description["architecture"] | {"network": name})
        network = make_network(params, len(classes))
        network.load_state_dict(weights)
        normalization = Normalization.model_validate(description["normalization"])
    except FileNotFoundError:
        raise UserError(f"{path} is absent: `make repro` makes it, `dvc pull` brings it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a model of this pipeline ({' '.join(str(error).split())})") from None
    return TrainedModel(network.eval(), normalization, classes)
