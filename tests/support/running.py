"""The web service on loopback, in a thread of the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn

from mnist_pipeline.serving.service import create_app, listen, load_classifier


@contextmanager
def running(model: Path) -> Iterator[str]:
    """Serve a model's file for a while, at the address that is given."""
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(*load_classifier(model)), log_level="warning"))
        thread = Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
