"""What a machine of a cluster checks before it trains: each refusal is one line that says what to do."""

import subprocess
from pathlib import Path
from socket import create_server

import pytest
from support.servers import free_port
from support.trials import repository_with_data

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.experiments.node import identify_images, identify_repository, prepare_node


@pytest.fixture(autouse=True)
def _repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository_with_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))


def test_a_machine_with_the_same_repository_and_images_is_ready() -> None:
    with create_server(("127.0.0.1", 0)) as mlflow:
        uri = f"http://127.0.0.1:{mlflow.getsockname()[1]}"
        prepare_node("node 1", identify_repository(), identify_images(), uri)


@pytest.mark.parametrize(
    ("file", "difference"),
    [
        ("src/mnist_pipeline/model/network.py", r"its code's SHA-256 is \w{64}, the driver's \w{64}: use"),
        ("requirements.lock", r"its requirements.lock's SHA-256 is \w{64}, the driver's \w{64}: use"),
    ],
)
def test_a_machine_with_other_code_or_another_lock_file_is_refused(file: str, difference: str) -> None:
    driver = identify_repository()
    Path(file).write_text(f"{Path(file).read_text()}# changed\n")
    with pytest.raises(UserError, match=f"^node 1 is refused: {difference} the same commit and `make setup` on both$"):
        prepare_node("node 1", driver, identify_images(), "http://127.0.0.1")


def test_a_machine_that_does_not_reach_mlflow_says_so_without_the_password() -> None:
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    with pytest.raises(
        UserError, match=r"^node 1 does not reach MLflow at http://127\.0\.0\.1:\d+ \(.*refused\)"
    ) as error:
        prepare_node("node 1", identify_repository(), identify_images(), uri)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("returncode", "output", "message"),
    [
        (
            1,
            "Pulling\nERROR: none\n",
            r"lacks the data, and `dvc pull` failed \(ERROR: none\): run `dvc push`",
        ),
        (0, "", r"is refused: its data's SHA-256 is \w{64}, the driver's other"),
    ],
)
def test_a_machine_whose_images_stay_different_is_refused(
    returncode: int, output: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = identify_repository()
    pulled = subprocess.CompletedProcess([], returncode, output)
    with create_server(("127.0.0.1", 0)) as mlflow:
        monkeypatch.setattr("mnist_pipeline.experiments.node.identify_repository", lambda: driver)
        monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pulled)
        with pytest.raises(UserError, match=f"^node 1 {message}"):
            prepare_node("node 1", driver, "other", f"http://127.0.0.1:{mlflow.getsockname()[1]}")
