"""`mlflow models serve` answers with the model in MLflow what the model file answers."""

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

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]


@pytest.fixture(scope="module")
def repository(trained: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return trained.copy(tmp_path_factory.mktemp("serving") / "repository")


@pytest.fixture(scope="module")
def served(repository: Repository) -> Iterator[httpx.Client]:
    """Serve the model of the run."""
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
def test_it_answers_as_the_model_file_does(
    served: httpx.Client, repository: Repository, params: Params, count: int
) -> None:
    images, _ = load_digits(DATA, "test")[:count].tensors(params.data, torch.device("cpu"))
    answered = served.post("/invocations", json={"inputs": images.tolist()})
    assert answered.status_code == 200, answered.text
    expected = predict(load_model(repository.root / "models/model.safetensors").network, images, batch_size=count)
    assert torch.allclose(torch.tensor(answered.json()["predictions"]), expected, atol=1e-5)


@pytest.mark.parametrize("inputs", [[[0.0]], "seven", [[[[0.0] * 28] * 28] * 3]])
def test_another_shape_is_refused(served: httpx.Client, inputs: object) -> None:
    assert served.post("/invocations", json={"inputs": inputs}).status_code == 400
