"""What several test files share: five hundred real digits and the real params."""

import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from support import DATA, ROOT
from support.repository import FIRST_REPRO, Repository

from mnist_pipeline.common.kernels import pin_kernels
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.model_file import save_model
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.loop import start_training, train

pin_kernels()  # plugins may have imported torch already; it looks at the processor when it computes
torch.set_num_threads(1)  # with so few digits, threads would only wait for one another


@pytest.fixture
def small_data() -> Path:
    return DATA


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Repository:
    """A git repository after `dvc repro` of two epochs, all committed. Stories take a `copy` of it, never itself.

    All test processes share the one that the first of them makes.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "trained"
    with FileLock(f"{root}.lock"):
        if root.exists():
            return Repository(root)
        unfinished = root.with_name("trained.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        repository = Repository.create(unfinished, fresh=True).init()
        done = repository.dvc("repro")
        assert done.returncode == 0, done.stdout
        (unfinished / FIRST_REPRO).write_text(done.stdout, encoding="utf-8")
        repository.commit()
        repository.copy(root)
        return Repository(root)


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads most digits: the real network after twenty epochs on the few digits of tests/data."""
    params = load_params(ROOT / "params.yaml")
    digits = load_digits(DATA, "train").tensors(params.data, torch.device("cpu"))
    shrunk = params.train.model_copy(update={"epochs": 20, "batch_size": 16})
    training = start_training(build_model(params.model, params.seed), shrunk)
    list(train(training, digits, digits, shrunk, params.seed))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(training.model, path, params.model, params.data)
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long stories first, so that both processes end together."""
    items.sort(key=lambda item: item.get_closest_marker("pipeline") is None)
