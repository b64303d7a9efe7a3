"""The web service on loopback, in a thread of the test process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn

from mnist_pipeline.data.digits import DIGITS
from mnist_pipeline.serving.connections import configure, open_socket
from mnist_pipeline.serving.kept import KeptPictures
from mnist_pipeline.serving.service import create_app, load_classifier


@contextmanager
def running(model: Path, keep: Path | None = None) -> Iterator[str]:
    """Serve a model file inside the block, and keep pictures if a directory is given; yields the address."""
    kept = KeptPictures(keep, DIGITS) if keep else None
    with open_socket("127.0.0.1", 0) as listening:
        server = uvicorn.Server(configure(create_app(*load_classifier(model), kept=kept)))
        thread = Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
