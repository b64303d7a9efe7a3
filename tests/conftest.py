"""What several test files share: five hundred real digits and the real params."""

from pathlib import Path

import pytest
import torch

from mnist_pipeline.data import load_digits
from mnist_pipeline.model import build_model, save_model
from mnist_pipeline.params import Params, load_params
from mnist_pipeline.training import start_training, train

DATA = Path(__file__).parent / "data"

torch.set_num_threads(1)  # with so few digits, threads would only wait for one another


@pytest.fixture
def small_data() -> Path:
    return DATA


@pytest.fixture
def params() -> Params:
    return load_params(Path(__file__).parents[1] / "params.yaml")


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads most digits: the real network after twenty epochs on the few digits of tests/data."""
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    digits = load_digits(DATA, "train").tensors(params.data, torch.device("cpu"))
    shrunk = params.train.model_copy(update={"epochs": 20, "batch_size": 16})
    training = start_training(build_model(params.model, params.seed), shrunk)
    list(train(training, digits, digits, shrunk, params.seed))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(training.model, path, params.model, params.data)
    return path
