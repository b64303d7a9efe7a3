"""Describe a model file (`mnist info`): its digest, its normalisation, its network layer by layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mnist_pipeline.common.errors import printable
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
    origin: Mapping[str, Any] | None  # of a published model


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
        model.origin.model_dump() if model.origin else None,
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
    said = [file]
    if info.origin:
        said += _describe(info.origin)
    if info.classes != DIGITS:
        said.append(f"It tells apart {', '.join(info.classes)}.")
    said.append(f"Pixels (0 to 1) are normalised: minus the mean {mean:g}, divided by {std:g}.")
    return "\n".join([*said, "", table])


def _describe(origin: Mapping[str, Any]) -> list[str]:
    """Say how good a published model is, and how to train it again."""
    recipe, commit, digest = (printable(origin[name]) for name in ("recipe", "git_commit", "model_sha256"))
    accuracy = origin["figures"].get("test_accuracy", math.nan)
    return [
        f"Seed 0 of the recipe {recipe}: {accuracy:.2%} of the test images are right.",
        f"At commit {commit[:12]}, `mnist experiment {recipe} -S threads=1` trains it again:",
        f"{MODEL} then has the SHA-256 {digest}.",
    ]
