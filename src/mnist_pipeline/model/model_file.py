"""The file of a trained network: its weights (no pickle), architecture, normalisation and classes, and its origin."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import check_file, write_bytes
from mnist_pipeline.common.params import DataParams, ModelParams, Normalization
from mnist_pipeline.data.digits import DIGITS
from mnist_pipeline.model.network import count_parameters, make_network, network_params

_DESCRIPTION = "model"  # the key of the file's metadata
_UNSAID = {"network": "convolutional", "classes": DIGITS}  # what holds for a file that says nothing else
_MAX_BYTES = 1_000_000_000


class Origin(BaseModel):
    """Where a published model comes from: whoever trains with these params, commit and data gets the same weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    params: Mapping[str, Any]
    git_commit: str
    data_sha256: str
    model_sha256: str  # of the file that the train stage wrote: this one without its origin
    figures: Mapping[str, float]  # on the test images


@dataclass(frozen=True)
class TrainedModel:
    """A trained network in evaluation mode, its images' normalisation, its classes, and a published one's origin."""

    network: nn.Module
    normalization: Normalization
    classes: list[str] = field(default_factory=DIGITS.copy)
    origin: Origin | None = None


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
    write_bytes(path, _encode({name: tensor.cpu() for name, tensor in network.state_dict().items()}, description))


def add_origin(path: Path, published: Path, origin: Origin) -> None:
    """Write the model of a file to another file, with its origin."""
    weights, description = _read(path)
    write_bytes(published, _encode(weights, description | {"origin": origin.model_dump()}))


def _encode(weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> bytes:
    # One key holds everything: safetensors writes several keys in an order that differs from call to call.
    described = {_DESCRIPTION: json.dumps(description)}
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, described)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    check_file(path, _MAX_BYTES)
    with safetensors.safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        return weights, _UNSAID | json.loads(file.metadata()[_DESCRIPTION])


def load_model(path: Path) -> TrainedModel:
    """Build the network that a file of `save_model` describes, and load its weights.

    Raises:
        UserError: the file is absent or damaged, or holds another network.
    """
    try:
        weights, description = _read(path)
        name, classes = description["network"], description["classes"]
        params = network_params(name).model_validate(description["architecture"] | {"network": name})
        network = make_network(params, len(classes))
        network.load_state_dict(weights)
        normalization = Normalization.model_validate(description["normalization"])
        origin = Origin.model_validate(description["origin"]) if "origin" in description else None
    except FileNotFoundError:
        raise UserError(f"{path} is absent: `make repro` makes it, `dvc pull` brings it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a model of this pipeline ({' '.join(str(error).split())})") from None
    return TrainedModel(network.eval(), normalization, classes, origin)
