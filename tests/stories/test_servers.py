"""The tracking through a real `mlflow server`, and with one that is down, dies, hangs or answers with errors."""

import http.client
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from unittest import mock

import mlflow
import pytest
import torch
from mlflow.entities import Run
from support import DATA, ROOT
from support.in_process import inside, run_backfill, run_stage
from support.repository import REPORTS, Repository
from support.servers import Server, free_port, mlflow_at, say_rest, say_until, serving, wait_until  # noqa: F401 (a fixture)
from support.stores import EPOCHS, PARAMS, TRAIN

from mnist_pipeline.common.params import Params
from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.inference import predict
from mnist_pipeline.model.model_file import load_model
from mnist_pipeline.model.network import build_model
from mnist_pipeline.tracking import client
from mnist_pipeline.tracking.client import SECONDS
from mnist_pipeline.tracking.progress import TrainingLog
from mnist_pipeline.tracking.store import Store
from mnist_pipeline.tracking.training_run import training_run

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]

OUTPUTS = {"models/model.safetensors", "reports/figures/accuracy.png"}
OUTPUTS |= {f"reports/{name}" for name in REPORTS if name != "figures"}
STAGES = ("train", "evaluate", "report")
STORES = {"mlflow.db", "mlflow.db.lock", "mlartifacts", "mlruns"}  # what no stage makes beside a server
STALL = 30  # seconds that a server may cost at most
SECRET = "s3cr3tword"


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("sqlite")
    with serving(directory, f"sqlite:///{directory / 'server.db'}") as server:
        yield server


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Put a cluster of PostgreSQL behind the server, run by nobody where the tests run as root: it refuses root."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL is not on the PATH")
    psycopg2 = pytest.importorskip("psycopg2", exc_type=ImportError)
    user = None if os.geteuid() else "nobody"
    port = free_port()
    uri = f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    directory = Path(tempfile.mkdtemp(prefix="postgresql-"))  # pytest's own are closed to other users
    if user:
        shutil.chown(directory, user)

    def accepts() -> bool:
        try:
            psycopg2.connect(uri).close()
        except psycopg2.OperationalError:
            return False
        return True

    cluster = ["-D", str(directory / "cluster")]
    initdb = ["initdb", *cluster, "--username=mlflow", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
    postgres = ["postgres", *cluster, "-h", "127.0.0.1", "-p", str(port), "-c", "unix_socket_directories=", "-F"]
    log = tmp_path_factory.mktemp("postgresql") / "postgres.log"
    try:
        with log.open("wb") as output:
            subprocess.run(initdb, cwd=directory, user=user, stdout=output, stderr=output, check=True)
            process = subprocess.Popen(
                postgres, cwd=directory, user=user, stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until(accepts, process, log)
            with serving(log.parent, uri.replace("postgresql", "postgresql+psycopg2")) as server:
                yield server
        finally:
            process.send_signal(signal.SIGQUIT)  # at once; nobody needs its data again
            process.wait()
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def at_server(trained: Repository, root: Path, uri: str) -> Repository:
    """Copy the trained repository without its store, to be tracked by a server."""
    copy = trained.copy(root / "repository")
    for path in map(copy.root.joinpath, STORES):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return Repository(copy.root, uri)


def act_after_an_epoch(act: Callable[[], object]) -> AbstractContextManager[object]:
    """Within the block, do something once a training in this process has shown its first epoch."""
    show = TrainingLog.on_epoch

    def show_and_act(log: TrainingLog, result: EpochResult) -> None:
        show(log, result)
        if result.epoch == 1:
            act()

    return mock.patch.object(TrainingLog, "on_epoch", show_and_act)


def outputs(repository: Repository, *patterns: str) -> dict[str, bytes]:
    found = [
        path
        for pattern in patterns
        for path in repository.root.glob(pattern)
        if path.is_file() and path.name != ".gitkeep"
    ]
    return {str(path.relative_to(repository.root)): path.read_bytes() for path in found}


def all_outputs(repository: Repository) -> dict[str, bytes]:
    return outputs(repository, "models/*.safetensors", "reports/**/[!.]*")  # not what DVC has git ignore


def outputs_of_training(repository: Repository) -> dict[str, bytes]:
    return outputs(repository, "models/*.safetensors", "reports/history.csv")


def warnings(said: str) -> list[str]:
    return re.findall(r"(?m)^warning: MLflow at .*$", said)


def runs(repository: Repository) -> list[Run]:
    """Return the runs of a repository, of all that the server has, the newest first."""
    place = f"{platform.node()}:{repository.root.resolve()}"
    return [run for run in repository.runs() if run.data.tags["workspace"] == place]


def check_training(repository: Repository, run: Run) -> None:
    """Check that a run is finished and has each epoch of the history, once and in order."""
    epochs = (repository.root / "reports/history.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert run.info.status == "FINISHED"
    for metric in ("learning_rate", "train_loss", "train_accuracy", "monitor_loss", "monitor_accuracy"):
        assert repository.steps(run, metric) == list(range(1, len(epochs) + 1)), metric


def check_later_stages(repository: Repository, run: Run) -> None:
    """Check that a run has the scores of the test, and that the server gives out the report."""
    metrics = json.loads((repository.root / "reports/metrics.json").read_text(encoding="utf-8"))
    assert run.data.metrics["test_accuracy"] == metrics["test_accuracy"]
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert {file.path for file in repository.client.list_artifacts(run.info.run_id, "reports")} == {
        f"reports/{name}" for name in REPORTS
    }
    with tempfile.TemporaryDirectory() as directory:
        downloaded = repository.client.download_artifacts(run.info.run_id, "reports/report.md", directory)
        assert Path(downloaded).read_bytes() == (repository.root / "reports/report.md").read_bytes()


def test_a_copied_repository_has_its_artifacts_in_the_copy(trained: Repository, tmp_path: Path) -> None:
    copy = trained.copy(tmp_path / "copy")
    with closing(sqlite3.connect(copy.root / "mlflow.db")) as database:
        assert [line for line in database.iterdump() if str(trained.root) in line] == []
    [run] = copy.runs()
    assert run.info.artifact_uri.startswith(copy.root.as_uri())


# A server that is down


@dataclass(frozen=True)
class Mended:
    """The stages with nothing on the port of their server, and two backfills to a server that works."""

    absent: str
    repository: Repository
    stages: dict[str, "subprocess.CompletedProcess[str]"]
    outputs: dict[str, bytes]
    backfills: list["subprocess.CompletedProcess[str]"]
    runs: list[list[Run]]


@pytest.fixture(scope="module")
def mended(trained: Repository, tmp_path_factory: pytest.TempPathFactory, sqlite: Server) -> Mended:
    absent = at_server(trained, tmp_path_factory.mktemp("mended"), f"http://127.0.0.1:{free_port()}")
    stages = {stage: run_stage(absent, stage) for stage in STAGES}
    repository = Repository(absent.root, sqlite.uri)
    backfills, found = [], []
    for _ in range(2):
        backfills.append(run_backfill(repository))
        found.append(runs(repository))
    return Mended(absent.uri, repository, stages, all_outputs(repository), backfills, found)


@pytest.mark.parametrize(
    ("stage", "untracked"), [("train", "this training"), ("evaluate", "what evaluate found"), ("report", "the report")]
)
def test_a_server_that_is_down_costs_each_stage_a_warning_and_nothing_else(
    mended: Mended, stage: str, untracked: str
) -> None:
    said = mended.stages[stage].stdout
    assert mended.stages[stage].returncode == 0, said
    assert "Traceback" not in said
    [warning] = warnings(said)
    assert warning.startswith(f"warning: MLflow at {mended.absent} failed (")
    assert f"so {untracked} is not tracked" in warning


def test_the_backfill_makes_the_run_that_a_server_missed(mended: Mended) -> None:
    assert mended.backfills[0].returncode == 0, mended.backfills[0].stdout
    [run] = mended.runs[0]
    check_training(mended.repository, run)
    check_later_stages(mended.repository, run)
    assert run.data.tags["backfilled"] == "train, evaluate, report"


def test_a_second_backfill_adds_nothing(mended: Mended) -> None:
    assert mended.backfills[1].returncode == 0, mended.backfills[1].stdout
    assert mended.backfills[1].stdout == "MLflow has all of the run of models/model.safetensors\n"
    assert [run.to_dictionary() for run in mended.runs[1]] == [run.to_dictionary() for run in mended.runs[0]]


def test_a_required_server_that_is_down_is_an_error_before_the_training(tmp_path: Path) -> None:
    repository = Repository.create_with_data(tmp_path, f"http://127.0.0.1:{free_port()}")
    ended = run_stage(repository, "train", MNIST_TRACKING="required")
    assert ended.returncode == 1
    assert re.fullmatch(rf"error: MLflow at {repository.uri} failed \(.*\n", ended.stdout), ended.stdout
    assert outputs(repository, "models/*", "reports/**/*", ".checkpoints/*") == {}


# A server that works


@dataclass(frozen=True)
class Tracked:
    repository: Repository
    stages: dict[str, "subprocess.CompletedProcess[str]"]

    @property
    def run(self) -> Run:
        [run] = runs(self.repository)
        return run


@pytest.fixture(scope="module")
def tracked(trained: Repository, tmp_path_factory: pytest.TempPathFactory, server: Server, mended: Mended) -> Tracked:
    """Run the stages after `mended`, whose backfill would find this very model on the server."""
    uri = server.uri.replace("://", f"://me:{SECRET}@")
    repository = at_server(trained, tmp_path_factory.mktemp("tracked"), uri)
    return Tracked(repository, {stage: run_stage(repository, stage) for stage in STAGES})


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_succeeds_without_a_warning(tracked: Tracked, stage: str) -> None:
    assert tracked.stages[stage].returncode == 0, tracked.stages[stage].stdout
    assert not re.search("(?i)warning|error|Traceback", tracked.stages[stage].stdout), tracked.stages[stage].stdout


def test_a_training_is_one_finished_run_with_every_epoch(tracked: Tracked) -> None:
    check_training(tracked.repository, tracked.run)


def test_the_later_stages_add_to_it(tracked: Tracked) -> None:
    check_later_stages(tracked.repository, tracked.run)
    assert tracked.run.data.tags["backfilled"] == "none"


def test_the_server_gives_the_model_out(tracked: Tracked, params: Params, mlflow_at: Callable[[str], None]) -> None:
    images, _ = load_digits(DATA, "test").tensors(params.data, torch.device("cpu"))
    expected = predict(load_model(tracked.repository.root / "models/model.safetensors").network, images[:7], 7)
    [model] = tracked.run.outputs.model_outputs
    mlflow_at(tracked.repository.uri)
    for uri in (f"models:/{model.model_id}", f"runs:/{tracked.run.info.run_id}/model"):
        predicted = mlflow.pyfunc.load_model(uri).predict(images[:7].numpy())
        assert torch.allclose(torch.as_tensor(predicted), expected, atol=1e-5), uri


def test_the_password_of_the_address_is_shown_and_kept_nowhere(tracked: Tracked, server: Server) -> None:
    assert SECRET not in "".join(stage.stdout for stage in tracked.stages.values())
    for root in (server.directory, tracked.repository.root):
        kept = [path for path in root.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
        assert kept == []
    tags = tracked.run.data.tags | tracked.run.data.params
    assert [name for name, value in tags.items() if SECRET in value] == []


def test_no_store_is_made_beside_the_server(tracked: Tracked, mended: Mended) -> None:
    for repository in (tracked.repository, mended.repository):
        assert STORES & {path.name for path in repository.root.iterdir()} == set()


def test_the_outputs_are_the_same_bytes_without_a_server(tracked: Tracked, mended: Mended, trained: Repository) -> None:
    assert all_outputs(tracked.repository) == mended.outputs == all_outputs(trained)
    assert mended.outputs.keys() >= OUTPUTS


def test_a_training_that_was_killed_continues_in_its_run(tmp_path: Path, sqlite: Server) -> None:
    repository = Repository.create_with_data(tmp_path, sqlite.uri, epochs=8)
    process = repository.start(sys.executable, "stages/train.py")
    say_until(process, "^Epoch: 2/")
    process.kill()
    say_rest(process)
    [killed] = runs(repository)
    assert killed.info.status == "RUNNING"
    again = repository.stage("train")
    assert again.returncode == 0, again.stdout
    assert "Going on after epoch" in again.stdout
    [run] = runs(repository)
    assert run.info.run_id == killed.info.run_id
    check_training(repository, run)


def test_a_training_continues_in_the_run_that_the_server_has_a_part_of(tmp_path: Path, sqlite: Server) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with inside(Repository(tmp_path, sqlite.uri)):
        part = Store().begin_run(TRAIN)
        part.log_epoch(EPOCHS[0].row())
        with training_run(TRAIN, {}, build_model(PARAMS.model, seed=0), EPOCHS, part.id) as continued:
            assert continued.id == part.id
        run = Store().client.get_run(part.id)
    assert run.info.status == "FINISHED"
    assert Repository(tmp_path, sqlite.uri).steps(run) == [1, 2]


# A server that fails during a training


@dataclass(frozen=True)
class Halfway:
    """A training whose server dies after the first epoch, and a backfill when the server is back."""

    repository: Repository
    training: "subprocess.CompletedProcess[str]"
    left: list[Run]
    backfill: "subprocess.CompletedProcess[str]"
    runs: list[Run]


@pytest.fixture(scope="module")
def halfway(trained: Repository, tmp_path_factory: pytest.TempPathFactory, sqlite: Server, mended: Mended) -> Halfway:
    """Train after `mended`, in an experiment of DVC: else the backfill would find the same model's run there."""
    repository = at_server(trained, tmp_path_factory.mktemp("halfway"), sqlite.uri)
    experiment = {"DVC_EXP_NAME": "halfway"}
    with act_after_an_epoch(sqlite.kill):
        training = run_stage(repository, "train", **experiment)
    sqlite.start()
    sqlite.wait()
    left = runs(repository)
    backfill = run_backfill(repository, **experiment)
    return Halfway(repository, training, left, backfill, runs(repository))


def test_a_server_that_dies_costs_a_training_only_its_later_epochs_in_the_run(
    halfway: Halfway, trained: Repository
) -> None:
    assert halfway.training.returncode == 0, halfway.training.stdout
    assert "Traceback" not in halfway.training.stdout
    [warning] = warnings(halfway.training.stdout)
    assert "so this training after epoch 1 is not tracked" in warning
    assert outputs_of_training(halfway.repository) == outputs_of_training(trained)


def test_the_backfill_completes_the_run_that_a_server_has_a_part_of(halfway: Halfway) -> None:
    assert halfway.backfill.returncode == 0, halfway.backfill.stdout
    [left], [run] = halfway.left, halfway.runs
    assert left.info.status == "RUNNING"
    assert run.info.run_id == left.info.run_id
    assert (left.data.tags["backfilled"], run.data.tags["backfilled"]) == ("none", "train, evaluate, report")
    check_training(halfway.repository, run)
    check_later_stages(halfway.repository, run)


def test_a_server_that_hangs_half_way_costs_a_training_seconds(
    trained: Repository, tmp_path: Path, sqlite: Server
) -> None:
    repository = at_server(trained, tmp_path, sqlite.uri)
    begin = time.monotonic()
    try:
        with act_after_an_epoch(lambda: sqlite.send(signal.SIGSTOP)):
            training = run_stage(repository, "train")
    finally:
        sqlite.send(signal.SIGCONT)
    assert training.returncode == 0, training.stdout
    [warning] = warnings(training.stdout)
    assert "after epoch 1" in warning
    assert outputs_of_training(repository) == outputs_of_training(trained)
    assert time.monotonic() - begin < STALL


# A server that is no help


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """Answer every request in the same way."""

    class Handler(BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            with suppress(ConnectionError):  # nobody waits for the answer any more
                answer(self)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815 (the base class's names)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        try:
            yield stub.server_port
        finally:
            stub.shutdown()


def with_an_error(status: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()

    return answer


def byte_by_byte(before: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """Begin an answer with these bytes, and go on with one byte at a time for ever."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(before)
        while True:
            request.wfile.write(b"x")
            time.sleep(0.3)

    return answer


def late(server: Server, seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer as a server does, but that much later."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in request.headers.items() if name != "Host"}
        time.sleep(seconds)
        with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            content = response.read()
        request.send_response(response.status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    return answer


@contextmanager
def silent() -> Iterator[int]:
    """Accept connections, by the kernel, and never answer."""
    with create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def check_untracked_training(trained: Repository, root: Path, port: int) -> None:
    """Check that a training with nothing but trouble at its server's port costs one warning and a few seconds."""
    repository = at_server(trained, root, f"http://127.0.0.1:{port}")
    begin = time.monotonic()
    training = run_stage(repository, "train")
    assert time.monotonic() - begin < STALL
    assert training.returncode == 0, training.stdout
    assert "Traceback" not in training.stdout
    [warning] = warnings(training.stdout)
    assert warning.startswith(f"warning: MLflow at {repository.uri} failed (")
    assert "so this training is not tracked" in warning
    assert outputs_of_training(repository) == outputs_of_training(trained)


@pytest.mark.parametrize(("status", "headers"), [(500, {}), (503, {"Retry_After": "3600"})])
def test_a_server_that_answers_with_errors_costs_a_training_a_warning_and_seconds(
    trained: Repository, tmp_path: Path, status: int, headers: dict[str, str]
) -> None:
    with answering(with_an_error(status, **headers)) as port:
        check_untracked_training(trained, tmp_path, port)


DRIPPING = {"its header": b"HTTP/1.0 200 OK\r\nX-Long: ", "its content": b"HTTP/1.0 200 OK\r\n\r\n"}


@pytest.mark.parametrize("begin", DRIPPING.values(), ids=DRIPPING)
@pytest.mark.parametrize("seconds", [2, SECONDS])
def test_a_server_that_sends_byte_by_byte_costs_a_training_a_warning_and_seconds(
    trained: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: bytes, seconds: int
) -> None:
    monkeypatch.setattr(client, "SECONDS", seconds)
    with answering(byte_by_byte(begin)) as port:
        check_untracked_training(trained, tmp_path, port)


def test_a_server_whose_answers_are_late_costs_a_training_as_much_and_the_backfill_waits_for_it(
    trained: Repository, tmp_path: Path, sqlite: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SECONDS", 3)
    with answering(late(sqlite, 0.2)) as port:
        repository = at_server(trained, tmp_path, f"http://127.0.0.1:{port}")
        training = run_stage(repository, "train", DVC_EXP_NAME="late")
        [warning] = warnings(training.stdout)
        assert "(it took more than 3 seconds), so this training" in warning
        backfill = run_backfill(repository, DVC_EXP_NAME="late")
        assert backfill.returncode == 0, backfill.stdout
        [run] = runs(repository)
        check_training(repository, run)
        check_later_stages(repository, run)


def test_a_server_that_never_answers_costs_a_training_a_warning_and_seconds(
    trained: Repository, tmp_path: Path
) -> None:
    with silent() as port:
        check_untracked_training(trained, tmp_path, port)
