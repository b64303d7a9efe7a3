"""The model in MLflow, served by `mlflow models serve`: it answers what the model's file answers."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import torch
from support import DATA
from support.repository import Repository
from support.servers import free_port, wait_until

from mnist_pipeline.common.params import Params
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which a model was trained."""
    repository = Repository.create(tmp_path_factory.mktemp("serving"))
    for stage in ("download", "train"):
        said = repository.stage(stage)
        assert said.returncode == 0, said.stdout
    return repository


@pytest.fixture(scope="module")
def served(repository: Repository) -> Iterator[httpx.Client]:
    """Serve the model of the run as README.md says."""
    (run,) = repository.runs()
    port, log = free_port(), repository.root / "serving.log"
    uri = f"runs:/{run.info.run_id}/model"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--port", str(port)],
            cwd=repository.root,
            env=repository.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return client.get("/ping").status_code == 200
            return False

        try:
            wait_until(answers, process, log)
            yield client
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("count", [1, 5])
def test_it_answers_as_the_models_file_does(
    served: httpx.Client, repository: Repository, params: Params, count: int
) -> None:
    images, _ = load_digits(DATA, "test")[:count].tensors(params.data, torch.device("cpu"))
    answered = served.post("/invocations", json={"inputs": images.tolist()})
    assert answered.status_code == 200, answered.text
    expected = predict(load_model(repository.root / "models/model.safetensors"), images, batch_size=count)
    assert torch.allclose(torch.tensor(answered.json()["predictions"]), expected, atol=1e-5)


@pytest.mark.parametrize("inputs", [[[0.0]], "seven", [[[[0.0] * 28] * 28] * 3]])
def test_another_shape_is_refused(served: httpx.Client, inputs: object) -> None:
    assert served.post("/invocations", json={"inputs": inputs}).status_code == 400
