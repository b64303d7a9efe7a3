"""What several test files share: five hundred real digits and the real params."""

from pathlib import Path

import pytest
import torch

from mnist_pipeline.params import Params, load_params

torch.set_num_threads(1)  # with so few digits, threads would only wait for one another


@pytest.fixture
def small_data() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture
def params() -> Params:
    return load_params(Path(__file__).parents[1] / "params.yaml")
