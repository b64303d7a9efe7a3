"""The web service: a page to draw a digit on, and the API behind it, which reads the digit in an image."""

import base64
import hashlib
import io
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import numpy as np
import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.files import sha256
from mnist_pipeline.common.paths import MODEL
from mnist_pipeline.data.digits import CLASSES, SIDE
from mnist_pipeline.model.network import count_parameters
from mnist_pipeline.serving.classifier import Classifier
from mnist_pipeline.serving.preprocessing import normalize, open_image

MAX_BYTES = 5_000_000  # of a request's body
AT_ONCE = 2  # images decoded at a time; the others wait as the bytes that they came in
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream"]

Probability = Annotated[float, Field(ge=0, le=1)]


class Model(BaseModel):
    """The model that answers: where it comes from, the SHA-256 of its file, how many parameters it learned."""

    source: str
    sha256: str
    parameters: int


class Health(BaseModel):
    """That the service answers, and with which model."""

    status: Literal["ok"]
    model: Model


class Answer(BaseModel):
    """The digit in an image, how probable each of the ten is, and as a PNG what the network was shown."""

    digit: Annotated[int, Field(ge=0, lt=CLASSES)]
    probability: Probability
    probabilities: Annotated[list[Probability], Field(min_length=CLASSES, max_length=CLASSES)]
    image: Annotated[str, Field(description=f"{SIDE}×{SIDE} grey pixels as a data URI")]
    model: Model


class Problem(BaseModel):
    """What is wrong with a request, in one line."""

    detail: str


def create_app(classifier: Classifier, model: Model, hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """Return the service, which answers requests to the given host names alone.

    A page elsewhere whose name was made to lead here (DNS rebinding) gets no answer.
    """
    app = FastAPI(
        title="Handwritten digits",
        version=version("mnist-pipeline"),
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={400: {"description": "Another host's name", "content": {"text/plain": {}}}},
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    page, headers = load_page()
    limiter = CapacityLimiter(AT_ONCE)

    def answer(body: bytes) -> Answer:
        pixels = normalize(open_image(body))
        prediction = classifier.classify(pixels)
        return Answer(
            digit=prediction.digit,
            probability=prediction.probability,
            probabilities=prediction.probabilities,
            image=data_uri(pixels),
            model=model,
        )

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def draw() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz", summary="Say that the service answers, and with which model")
    def healthz() -> Health:
        return Health(status="ok", model=model)

    @app.post(
        "/predict",
        summary="Read the digit in an image",
        openapi_extra={
            "requestBody": {
                "description": f"The image itself, at most {MAX_BYTES:,} bytes of any format that Pillow opens",
                "required": True,
                "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in TYPES},
            }
        },
        responses={
            413: {"model": Problem, "description": "Too many bytes"},
            422: {"model": Problem, "description": "No image, too many pixels, or nothing in it"},
        },
    )
    async def predict(request: Request) -> Answer:
        return await to_thread.run_sync(answer, await read_body(request), limiter=limiter)

    @app.exception_handler(UserError)
    def refuse(request: Request, error: UserError) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=422)

    @app.exception_handler(ClientDisconnect)
    def forget(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    return app


async def read_body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        HTTPException: it has more than MAX_BYTES.
        UserError: it is empty.
    """
    too_large = HTTPException(413, f"the image has more than {MAX_BYTES:,} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise too_large
    if not body:
        raise UserError("the request has no body: send an image as its body")
    return bytes(body)


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return grey pixels (height, width) as a PNG in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def load_page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers, which let it run its own script and style and load nothing else."""
    page = files("mnist_pipeline.serving").joinpath("draw.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        content = "".join(re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    policy = [
        "default-src 'none'",
        f"script-src 'sha256-{digest('script')}'",
        f"style-src 'sha256-{digest('style')}'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def load_classifier(path: Path | None) -> tuple[Classifier, Model]:
    """Load the model of a file, else the registry's champion, else what the train stage wrote.

    Raises:
        UserError: there is none, or the file is no model.
    """

    def load(file: Path, source: str) -> tuple[Classifier, Model]:
        classifier = Classifier(file)
        parameters = count_parameters(classifier.network)
        return classifier, Model(source=source, sha256=sha256(file), parameters=parameters)

    if path is not None:
        return load(path, str(path))

    from mnist_pipeline.tracking.registry import fetch_champion

    with TemporaryDirectory() as directory:
        if champion := fetch_champion(Path(directory)):
            return load(*champion)
    if not MODEL.exists():
        raise UserError(f"{MODEL} is absent: `make repro` makes it, `dvc pull` brings it")
    return load(MODEL, str(MODEL))


def serve(host: str, port: int, path: Path | None) -> None:
    """Serve the page and the API until Ctrl-C or SIGTERM, on any free port where it is 0.

    Raises:
        UserError: there is no model, or the address is not free.
    """
    sys.setswitchinterval(0.0005)  # the thread that talks to the network waits less for those that compute
    with suppress(KeyboardInterrupt), listen(host, port) as listening:
        classifier, model = load_classifier(path)
        classifier.classify(np.zeros((SIDE, SIDE), np.uint8))  # the first time takes longest
        app = create_app(classifier, model, host_names(host))
        name = f"[{host}]" if ":" in host else host
        port = listening.getsockname()[1]
        print(f"Serving {model.source} (SHA-256 {model.sha256[:12]}) at http://{name}:{port}", flush=True)
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=5)
        uvicorn.Server(config).run([listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        UserError: the address is not free, or not of this machine.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot serve at {host}, port {port} ({reason}): choose others by --host or --port") from None
    # The connections inherit it. Without, each answer waits 40 ms for the acknowledgement of its headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def host_names(host: str) -> list[str]:
    """Return the names by which a service that listens at a host may be called: any where it listens everywhere."""
    with suppress(ValueError):
        if ip_address(host).is_unspecified:
            return ["*"]
    return [*LOOPBACK, f"[{host}]" if ":" in host else host]
