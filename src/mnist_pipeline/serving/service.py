"""The web service: a page to draw a digit on, and the API behind it, which reads the digit in an image."""

import base64
import hashlib
import io
import json
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from importlib.metadata import version
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
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

from mnist_pipeline.common.errors import UserError, printable
from mnist_pipeline.common.files import sha256
from mnist_pipeline.data.digits import SIDE
from mnist_pipeline.model.network import count_parameters
from mnist_pipeline.serving.classifier import Classifier, find_model
from mnist_pipeline.serving.connections import configure, open_socket
from mnist_pipeline.serving.kept import KeptPictures
from mnist_pipeline.serving.picture_file import PICTURE_FORMATS

LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
MAX_BODY_BYTES = 5_000_000
_DECODERS = 2  # images decoded at a time; the others wait, still encoded
_MANY_PIXELS = 16_000_000  # of images with more, or slow for another reason, one is decoded at a time, beside others
_FORMATS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream"]
_Probability = Annotated[float, Field(ge=0, le=1)]


class ServedModel(BaseModel):
    """The model that answers: where it comes from, the SHA-256 of its file, its number of learned parameters."""

    source: str
    sha256: str
    parameters: int


class HealthResponse(BaseModel):
    """The service is up, and this model answers."""

    status: Literal["ok"]
    model: ServedModel
    keeps: bool  # whether it keeps the pictures that it reads


class PredictResponse(BaseModel):
    """The digit in an image, or another class by its number and name; the probability of each; what the network got."""

    digit: Annotated[int, Field(ge=0)]
    probability: _Probability
    probabilities: Annotated[list[_Probability], Field(min_length=2)]
    name: str
    image: Annotated[str, Field(description=f"{SIDE}×{SIDE} grey pixels, a PNG as a data URI")]
    model: ServedModel
    kept: Annotated[str | None, Field(description="The picture's name in /kept, if the service keeps pictures")]


class ErrorResponse(BaseModel):
    """What is wrong with a request, in one line."""

    detail: str


def create_app(
    classifier: Classifier, model: ServedModel, hosts: Sequence[str] = LOOPBACK, kept: KeptPictures | None = None
) -> FastAPI:
    """Build the service, which may keep the pictures that it reads.

    It answers only requests to the given host names, which prevents DNS rebinding.
    """
    app = FastAPI(
        title="Handwritten digits",
        version=version("mnist-pipeline"),
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={
            400: {"description": "The service does not answer to this host name", "content": {"text/plain": {}}}
        },
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    page, headers = _load_page(classifier.model.classes)
    limiters = {False: CapacityLimiter(_DECODERS), True: CapacityLimiter(1)}

    def answer(body: bytes, keep: bool) -> PredictResponse:
        prediction, pixels = classifier.read(body)
        name = kept.add(pixels, prediction, model.sha256) if kept and keep else None
        return PredictResponse(**vars(prediction), image=_encode_png(pixels), model=model, kept=name)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def show_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz", summary="Check that the service is up, and see which model answers")
    def healthz() -> HealthResponse:
        return HealthResponse(status="ok", model=model, keeps=kept is not None)

    @app.post(
        "/predict",
        summary="Read the digit in an image",
        openapi_extra={
            "requestBody": {
                "description": f"The image itself, at most {MAX_BODY_BYTES:,} bytes in a usual format",
                "required": True,
                "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in _FORMATS},
            }
        },
        responses={
            413: {"model": ErrorResponse, "description": "Too many bytes"},
            422: {"model": ErrorResponse, "description": "Not an image, too many pixels, or no digit in it"},
        },
    )
    async def predict(request: Request, draft: bool = False) -> PredictResponse:
        """Read the digit in an image. The picture of a draft is never kept."""
        body = await _read_body(request)
        # Another site's page can send pictures here; a browser says so.
        keep = not draft and request.headers.get("sec-fetch-site", "same-origin") == "same-origin"
        return await to_thread.run_sync(answer, body, keep, limiter=limiters[_is_slow(body)])

    @app.put(
        "/kept/{name}",
        summary="Say what a kept picture shows",
        status_code=204,
        responses={404: {"model": ErrorResponse, "description": "No such picture, or no such class"}},
    )
    def label(name: str, label: int) -> None:
        if not (kept and kept.label(name, label)):
            raise HTTPException(404, "there is no such picture, or no such class")

    @app.exception_handler(UserError)
    def refuse(request: Request, error: UserError) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=422)

    @app.exception_handler(ClientDisconnect)
    def forget(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    return app


async def _read_body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        HTTPException: it has more than MAX_BODY_BYTES.
        UserError: it is empty.
    """
    too_large = HTTPException(413, f"the image has more than {MAX_BODY_BYTES:,} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    if not body:
        raise UserError("the request has no body: send an image as its body")
    return bytes(body)


def _is_slow(body: bytes) -> bool:
    """Return whether an image may take seconds, as its header says: it has many pixels, or is decoded in Python."""
    with warnings.catch_warnings(), suppress(Exception):  # open_image will say what is wrong with it
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(body), formats=PICTURE_FORMATS) as image:
            pixels = image.width * image.height
            return pixels > _MANY_PIXELS or any(tile[0] in Image.DECODERS for tile in image.tile)
    return False


def _encode_png(pixels: NDArray[np.uint8]) -> str:
    """Return grey pixels (height, width) as a PNG in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _load_page(classes: list[str]) -> tuple[str, dict[str, str]]:
    """Return the page and its headers, which allow only its own script and style and requests to this server."""
    page = files("mnist_pipeline.serving").joinpath("draw.html").read_text(encoding="utf-8")
    page = page.replace("CLASSES", escape(json.dumps(classes)), 1)

    def digest(tag: str) -> str:
        content = "".join(re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return page, {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def load_classifier(path: Path | None) -> tuple[Classifier, ServedModel]:
    """Load the model in a file, or the one that `find_model` chooses.

    Raises:
        UserError: the file is absent, or is not a model.
    """
    with find_model(path) as (file, source):
        classifier = Classifier(file)
        parameters = count_parameters(classifier.model.network)
        return classifier, ServedModel(source=source, sha256=sha256(file), parameters=parameters)


def run_service(host: str, port: int, path: Path | None, keep: Path | None = None) -> None:
    """Serve the page and the API until Ctrl-C or SIGTERM; port 0 stands for any free port.

    Pictures that are read are kept in the directory `keep`, if it is given.

    Raises:
        UserError: there is no model, the address is not free, or the directory cannot be written to.
    """
    sys.setswitchinterval(0.0005)  # the thread that answers requests waits less for those that compute
    with suppress(KeyboardInterrupt), open_socket(host, port) as listening:
        classifier, model = load_classifier(path)
        classifier.classify(np.zeros((SIDE, SIDE), np.uint8))  # the first call is slow
        kept = KeptPictures(keep, classifier.model.classes) if keep else None
        app = create_app(classifier, model, allowed_hosts(host), kept)
        address = f"http://{_in_url(host)}:{listening.getsockname()[1]}"
        keeping = printable(f", keeping pictures in {keep}") if keep else ""
        print(f"Serving {printable(model.source)} (SHA-256 {model.sha256[:12]}) at {address}{keeping}", flush=True)
        uvicorn.Server(configure(app)).run([listening])


def allowed_hosts(host: str) -> list[str]:
    """Return the host names that a service at this address answers to: any, if it listens on all addresses."""
    with suppress(ValueError):
        if ip_address(host).is_unspecified:
            return ["*"]
    return [*LOOPBACK, _in_url(host)]


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
