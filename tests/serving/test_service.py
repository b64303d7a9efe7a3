"""The web service: it answers an image with its digit, anything else with one clear line, and ends quietly."""

import base64
import io
import random
import re
import shutil
import signal
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from html.parser import HTMLParser
from pathlib import Path

import httpx
import mlflow
import numpy as np
import pytest
import schemathesis
from click.testing import CliRunner
from hypothesis import given, settings, strategies
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance
from support import DATA
from support.repository import Repository
from support.running import running
from support.stores import isolated_tracking

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.paths import MODEL
from mnist_pipeline.data.digits import Digits, load_digits
from mnist_pipeline.serving.classifier import Classifier
from mnist_pipeline.serving.connections import MAX_CONNECTIONS
from mnist_pipeline.serving.picture_file import open_image
from mnist_pipeline.serving.preprocessing import to_mnist_image
from mnist_pipeline.serving.service import LOOPBACK, MAX_BODY_BYTES, allowed_hosts, load_classifier
from mnist_pipeline.tracking.registry import fetch_champion
from mnist_pipeline.tracking.run import MODEL_TAG
from mnist_pipeline.tracking.store import Store

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits(DATA, "test")


@pytest.fixture(scope="module")
def client(trained_model: Path) -> Iterator[httpx.Client]:
    with running(trained_model) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


def picture(pixels: np.ndarray, form: str = "PNG", side: int = 140) -> bytes:
    """Return a digit (28, 28) as somebody would send it, black on white."""
    image = Image.fromarray(255 - pixels).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def three(digits: Digits) -> bytes:
    return picture(digits.pixels[0].numpy())


def test_it_answers_as_the_classifier_does(client: httpx.Client, trained_model: Path, digits: Digits) -> None:
    classifier = Classifier(trained_model)
    for pixels in digits.pixels[:20].numpy():
        sent = picture(pixels)
        answer = client.post("/predict", content=sent).json()
        expected = classifier.classify(to_mnist_image(open_image(sent)))
        assert answer["digit"] == expected.digit
        assert answer["probability"] == answer["probabilities"][answer["digit"]]
        assert answer["probabilities"] == pytest.approx(expected.probabilities)
        assert sum(answer["probabilities"]) == pytest.approx(1)


def test_the_answer_shows_the_picture_that_the_network_got(client: httpx.Client, three: bytes) -> None:
    kind, encoded = client.post("/predict", content=three).json()["image"].split(",")
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert np.array_equal(np.asarray(shown), to_mnist_image(open_image(three)))


@pytest.mark.parametrize("form", FORMATS)
def test_it_opens_any_format_whatever_the_content_type(client: httpx.Client, digits: Digits, form: str) -> None:
    sent = picture(digits.pixels[1].numpy(), form)
    for kind in ("application/x-www-form-urlencoded", "image/png", "text/plain; charset=utf-8"):
        response = client.post("/predict", content=sent, headers={"Content-Type": kind})
        assert response.status_code == 200
        assert response.json()["digit"] == client.post("/predict", content=sent).json()["digit"]


def test_it_says_which_model_answers(client: httpx.Client, trained_model: Path, three: bytes) -> None:
    model = {"source": str(trained_model), "sha256": sha256(trained_model), "parameters": 19210}
    assert client.get("/healthz").json() == {"status": "ok", "model": model, "keeps": False}
    assert client.post("/predict", content=three).json()["model"] == model


def huge_png(width: int, height: int) -> bytes:
    """Return a small PNG; its header announces this size."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = buffer.getvalue().index(b"IHDR")
    content = buffer.getvalue()
    return content[:start] + header + struct.pack(">I", zlib.crc32(header)) + content[start + 21 :]


UNREADABLE = {
    "nothing": b"",
    "text": b"digit=7",
    "blank": picture(np.zeros((28, 28), np.uint8)),
    "all ink": picture(np.full((28, 28), 255, np.uint8)),
    "truncated": picture(load_digits(DATA, "test").pixels[0].numpy())[:-200],
    "cut in its header": picture(np.zeros((28, 28), np.uint8))[:20],
    "billions of pixels": huge_png(65_535, 65_535),
    "one column": huge_png(1, 50_000_000),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}


@pytest.mark.parametrize("sent", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_body_that_it_cannot_read_is_refused_in_one_line(client: httpx.Client, sent: bytes) -> None:
    response = client.post("/predict", content=sent)
    assert response.status_code == 422
    (said,) = response.json().values()
    assert len(said.splitlines()) == 1
    assert 10 < len(said) < 200


def test_a_body_with_too_large_a_content_length_is_refused(client: httpx.Client) -> None:
    response = client.post("/predict", content=bytes(MAX_BODY_BYTES + 1))
    assert response.status_code == 413
    assert response.json() == {"detail": "the image has more than 5,000,000 bytes"}


def test_a_stream_is_refused_as_soon_as_it_is_too_large(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2 * MAX_BODY_BYTES // 100_000):
            yield bytes(100_000)

    assert client.post("/predict", content=endless()).status_code == 413


# Connections


def connect(client: httpx.Client, sent: bytes = b"") -> socket.socket:
    """Open a connection to the service and send something on it."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10)
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket, within: float) -> bool:
    """Return whether the service closes a connection within some seconds."""
    connection.settimeout(within)
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


UNFINISHED = {
    "nothing": b"",
    "half of the headers": b"GET / HTTP/1.1\r\nHost: local",
    "half of a body": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf",
    "chunks without an end": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na",
    "a body that nobody reads": b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\nhalf",
    "half of a second request": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he",
}


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_a_request_that_does_not_come_to_its_end_is_cut_off(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("mnist_pipeline.serving.connections._MAX_SECONDS", 0.5)
    with connect(client, sent) as connection:
        assert not is_closed(connection, within=0.1)
        assert is_closed(connection, within=4)  # before uvicorn closes a connection that was used


def test_a_connection_may_last_as_long_as_its_requests_do_not(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, three: bytes
) -> None:
    monkeypatch.setattr("mnist_pipeline.serving.connections._MAX_SECONDS", 0.7)
    clients = set()
    with httpx.Client(base_url=client.base_url) as lasting:
        for _ in range(4):
            response = lasting.post("/predict", content=three)
            clients.add(response.extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(0.3)
    assert len(clients) == 1


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_idle_connections_make_room_for_others(client: httpx.Client, three: bytes, sent: bytes) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(client, sent)) for _ in range(100)]
        with httpx.Client(base_url=client.base_url) as other:
            assert other.post("/predict", content=three).status_code == 200
        assert sum(is_closed(connection, within=0.01) for connection in idle) >= 100 - MAX_CONNECTIONS


SLOW = {
    "many pixels": picture(np.zeros((28, 28), np.uint8), side=7000),
    "pixels as text": b"P3\n700 700\n255\n" + 700 * 700 * 3 * b"7 ",
}


@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW.keys())
def test_slow_images_do_not_keep_others_waiting(client: httpx.Client, three: bytes, slow: bytes) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.post, "/predict", content=slow) for _ in range(4)]
        time.sleep(0.1)
        assert client.post("/predict", content=three).status_code == 200
        assert not all(answer.done() for answer in answers)
        assert {answer.result().status_code for answer in answers} == {422}  # they are blank


def test_a_body_of_exactly_the_limit_is_read(client: httpx.Client, three: bytes) -> None:
    assert client.post("/predict", content=three + bytes(MAX_BODY_BYTES - len(three))).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/predict", 405), ("PUT", "/predict", 405), ("POST", "/", 405), ("DELETE", "/healthz", 405)]
    + [("GET", path, 404) for path in ("/docs", "/redoc", "/favicon.ico", "/predict/", "/../params.yaml")],
)
def test_other_methods_and_paths_are_refused(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "LOCALHOST", "[::1]:8000"])
def test_it_answers_under_the_names_of_this_machine(client: httpx.Client, host: str) -> None:
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com:8000", "", "[::2]"])
def test_it_does_not_answer_under_another_name(client: httpx.Client, host: str) -> None:
    for response in (client.get("/", headers={"Host": host}), client.post("/predict", headers={"Host": host})):
        assert response.status_code == 400


def test_it_answers_under_the_name_of_the_host_that_it_listens_at() -> None:
    assert allowed_hosts("127.0.0.1") == [*LOOPBACK, "127.0.0.1"]
    assert allowed_hosts("lab.example") == [*LOOPBACK, "lab.example"]
    assert allowed_hosts("::1") == [*LOOPBACK, "[::1]"]
    assert allowed_hosts("0.0.0.0") == allowed_hosts("::") == ["*"]


class Elements(HTMLParser):
    """The attributes of all elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += attributes


def test_the_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    attributes = Elements(response.text).attributes
    assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]
    assert {value for name, value in attributes if name in ("src", "href") and not str(value).startswith("data:")} == {
        "openapi.json"
    }
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", response.text)


def test_the_page_may_run_only_its_own_script_and_style(client: httpx.Client) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert client.head("/").headers["content-security-policy"] == policy


def test_the_interface_describes_the_image_and_every_answer(client: httpx.Client) -> None:
    predict = client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert predict["requestBody"]["required"]
    assert "image/png" in predict["requestBody"]["content"]
    assert set(predict["responses"]) == {"200", "400", "413", "422"}


@pytest.mark.parametrize(("method", "path"), [("POST", "/predict"), ("GET", "/healthz")])
def test_it_conforms_to_its_openapi(client: httpx.Client, three: bytes, method: str, path: str) -> None:
    schemathesis.openapi.media_type("image/png", strategies.one_of(strategies.just(three), strategies.binary()))
    operation = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")[path][method]

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(operation.as_strategy())
    def keep(case: schemathesis.Case) -> None:
        # Most bytes are not an image; no schema can tell which are.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    keep()


def damaged(image: bytes, chance: random.Random) -> bytes:
    """Return an image with some of its bytes changed, cut out or put in: one byte, or large parts."""
    content = bytearray(image)
    for _ in range(chance.choice([1, 2, 5, 30])):
        start = chance.randrange(len(content)) if chance.random() < 0.5 else chance.randrange(min(60, len(content)))
        match chance.randrange(5):
            case 0:
                content[start] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
            case 1:
                content[start : start + 4] = chance.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1]).to_bytes(4)
            case 2:
                del content[start : start + chance.choice([1, 4, 50])]
            case 3:
                content[start:start] = chance.randbytes(chance.choice([1, 4, 50]))
            case 4:
                del content[max(start, 8) :]
        if not content:
            break
    return bytes(content)


def test_no_damaged_image_breaks_it(client: httpx.Client, digits: Digits) -> None:
    chance = random.Random(0)
    images = [picture(digits.pixels[0].numpy(), form, side=40) for form in FORMATS]
    statuses = set()
    for _ in range(300):
        response = client.post("/predict", content=damaged(chance.choice(images), chance))
        statuses.add(response.status_code)
        assert response.status_code in (200, 422)
        assert response.status_code == 200 or len(response.json()["detail"].splitlines()) == 1
    assert statuses == {200, 422}
    assert client.post("/predict", content=images[0]).status_code == 200


# The command


@pytest.mark.pipeline
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)], ids=lambda number: number.name
)
def test_the_command_serves_until_a_signal_ends_it(
    tmp_path: Path, trained_model: Path, three: bytes, number: signal.Signals
) -> None:
    repository = Repository.create(tmp_path / "repository", fresh=True)
    digest = put_model(repository.root, trained_model)
    process = repository.start("sh", "-c", "ulimit -n 256; exec mnist serve --port 0")
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://\S+$", line)
    assert address, line + process.stdout.read()
    assert line == f"Serving {MODEL} (SHA-256 {digest[:12]}) at {address[0]}\n"
    with httpx.Client() as kept_open, ExitStack() as stack:
        for _ in range(400):  # more than there are file descriptors
            port = int(address[0].rpartition(":")[2])
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert kept_open.post(f"{address[0]}/predict", content=three).json()["model"]["sha256"] == digest
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")
    assert not list(repository.root.glob("mlflow.db*"))


def put_model(root: Path, model: Path) -> str:
    """Put a model where the train stage writes it; return its digest."""
    (root / MODEL).parent.mkdir()
    shutil.copy(model, root / MODEL)
    return sha256(model)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: it has neither a model nor a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def mistake(*options: str) -> str:
    """Return the message with which `mnist serve` fails."""
    result = CliRunner().invoke(mnist, ["serve", *options])
    assert isinstance(result.exception, UserError)
    return str(result.exception)


@pytest.mark.usefixtures("workspace")
def test_an_absent_model_is_an_error_in_one_line() -> None:
    assert mistake("--port", "0") == f"{MODEL} is absent: `make repro` makes it, `dvc pull` brings it"


def test_a_file_that_is_not_a_model_is_an_error_in_one_line(workspace: Path) -> None:
    (workspace / "other").write_text("seed: 0")
    assert re.fullmatch(r"other is not a model of this pipeline .*", mistake("--port", "0", "--model", "other"))


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_that_is_not_free_is_an_error_in_one_line(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = mistake("--host", host, "--port", str(port))
    assert re.fullmatch(rf"cannot serve at {host}, port {port} \(.*\): choose another --host or --port", message)


# Which model


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Connect to an empty store in the current directory."""
    with isolated_tracking(tmp_path):
        yield Store()


def promote(store: Store, model: Path, digest: str) -> None:
    """Log a run that trained a model, register its model and make it the champion."""
    run = store.client.create_run(store.experiment_id, tags={MODEL_TAG: digest}).info.run_id
    store.client.log_artifact(run, str(model), str(MODEL.parent))
    with suppress(mlflow.MlflowException):  # it exists
        store.client.create_registered_model("mnist")
    version = store.client.create_model_version("mnist", f"runs:/{run}/{MODEL}", run)
    store.client.set_registered_model_alias("mnist", "champion", version.version)


def test_the_registrys_champion_is_served(store: Store, trained_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "model.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"an older champion")
    promote(store, other, sha256(other))
    promote(store, trained_model, sha256(trained_model))
    classifier, model = load_classifier(None)
    assert model.source == "models:/mnist@champion, version 2"
    assert model.sha256 == sha256(trained_model)
    assert classifier.classify(np.zeros((28, 28), np.uint8)).digit in range(10)


def test_a_named_model_is_served_instead_of_the_champion(store: Store, trained_model: Path) -> None:
    promote(store, trained_model, sha256(trained_model))
    assert load_classifier(trained_model)[1].source == str(trained_model)


def test_without_a_champion_the_file_is_served(
    store: Store, trained_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = put_model(tmp_path, trained_model)
    assert load_classifier(None)[1].model_dump() == {"source": str(MODEL), "sha256": digest, "parameters": 19210}
    promote(store, trained_model, digest)
    store.client.delete_registered_model_alias("mnist", "champion")
    assert load_classifier(None)[1].source == str(MODEL)
    assert capsys.readouterr().err == ""


def test_a_champion_that_its_run_did_not_train_is_not_served(
    store: Store, trained_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_model(tmp_path, trained_model)
    promote(store, trained_model, "0" * 64)
    assert load_classifier(None)[1].source == str(MODEL)
    assert re.fullmatch(r"warning: .* is not the file .* the champion is not used\n", capsys.readouterr().err)


def test_a_store_that_fails_costs_a_warning(
    store: Store, trained_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_model(tmp_path, trained_model)
    (tmp_path / "mlflow.db").write_text("no database")
    assert load_classifier(None)[1].source == str(MODEL)
    assert re.fullmatch(
        r"warning: MLflow at sqlite:\S+ failed \(.*\), so the champion is not used\n", capsys.readouterr().err
    )


def test_no_store_is_made(tmp_path: Path) -> None:
    with isolated_tracking(tmp_path):
        (tmp_path / "mlflow.db").unlink()
        assert fetch_champion(tmp_path) is None
        assert not list(tmp_path.iterdir())
