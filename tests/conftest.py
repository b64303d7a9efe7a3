"""What several test files share: five hundred real digits and the real params."""

from pathlib import Path

import pytest

from mnist_pipeline.params import Params, load_params


@pytest.fixture
def small_data() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture
def params() -> Params:
    return load_params(Path(__file__).parents[1] / "params.yaml")
