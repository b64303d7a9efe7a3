"""A model of other classes than the digits."""

from pathlib import Path

from mnist_pipeline.common.params import load_params
from mnist_pipeline.model.model_file import save_model
from mnist_pipeline.model.network import build_model
from support import ROOT

CLOTHES = ["T-shirt/top", "Trouser", "Ankle boot"]


def write_clothes_model(directory: Path) -> Path:
    """Write an untrained network that tells clothes apart."""
    params = load_params(ROOT / "params.yaml")
    data = params.data.model_copy(update={"classes": CLOTHES})
    path = directory / "clothes.safetensors"
    save_model(build_model(params.model, seed=0, classes=len(CLOTHES)), path, params.model, data)
    return path
