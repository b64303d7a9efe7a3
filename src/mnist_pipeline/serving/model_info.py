"""Describe a model file (`mnist info`): its digest, its normalisation, its network layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.params import Normalization, load_params
from mnist_pipeline.common.paths import MODEL, PARAMS
from mnist_pipeline.data.digits import DIGITS
from mnist_pipeline.model.architecture import Layer, list_layers
from mnist_pipeline.model.model_file import TrainedModel, load_model
from mnist_pipeline.model.network import build_model


@dataclass(frozen=True)
class ModelInfo:
    """A network, its normalisation and its file; `model` and `sha256` are None for the network of `params.yaml`."""

    model: str | None
    sha256: str | None
    normalization: Mapping[str, float]
    parameters: int
    layers: list[Layer]
    classes: list[str]


def read_model_info(path: Path) -> ModelInfo:
    """Describe the network in a model file, or the one of `params.yaml` while the pipeline's model file is absent.

    Raises:
        UserError: any other file is absent, or the file is not a model.
    """
    if untrained := path == MODEL and not path.exists():
        params = load_params()
        network, data = build_model(params.model, params.seed, len(params.data.classes)), params.data
        model = TrainedModel(network, Normalization(mean=data.mean, std=data.std), data.classes)
    else:
        model = load_model(path)
    layers = list_layers(model.network)
    return ModelInfo(
        None if untrained else str(path),
        None if untrained else sha256(path),
        model.normalization.model_dump(),
        sum(layer.parameters for layer in layers),
        layers,
        model.classes,
    )


def render_model_info(info: ModelInfo) -> str:
    """Write the lines that `mnist info` prints."""
    file = (
        f"{info.model}: SHA-256 {info.sha256}"
        if info.model
        else f"{MODEL} is absent: this is the network of {PARAMS}, untrained"
    )
    mean, std = info.normalization["mean"], info.normalization["std"]
    rows = [
        (
            layer.path,
            layer.kind,
            "×".join(map(str, layer.output_shape)),
            f"{layer.parameters:,}",
            f"{layer.receptive_field or ''}",
        )
        for layer in info.layers
    ]
    table = tabulate(
        [*rows, ("total", "", "", f"{info.parameters:,}", "")],
        ["layer", "kind", "output", "parameters", "receptive field"],
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "left", "left", "right", "right"),
    )
    classes = "" if info.classes == DIGITS else f"\nIt tells apart {', '.join(info.classes)}."
    return f"{file}{classes}\nPixels (0 to 1) are normalised: minus the mean {mean:g}, divided by {std:g}.\n\n{table}"
