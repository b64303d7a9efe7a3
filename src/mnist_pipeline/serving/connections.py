"""How connections are accepted: how many at once, and for how long."""

import asyncio
import logging
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mnist_pipeline.common.errors import UserError

MAX_CONNECTIONS = 64  # each needs a file descriptor, and may hold a body in memory
_MAX_SECONDS = 30.0  # for a request to arrive and to be answered


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        UserError: the address is not free, or does not belong to this machine.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot serve at {host}, port {port} ({reason}): choose another --host or --port") from None
    # Its connections inherit this. Otherwise each answer waits 40 ms for the acknowledgement of its headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class _Connection(H11Protocol):
    """A connection that ends when a request takes too long, or to make room while its request is not yet here.

    Uvicorn itself waits without limit for the first request, for its headers and for its body.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_MAX_SECONDS, transport.abort)
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [other for other in self.connections if isinstance(other, _Connection) and other._is_waiting()]
            min(waiting, key=lambda other: other._deadline.when()).transport.abort()

    def _is_waiting(self) -> bool:
        """Return whether the connection is open, and its client has yet to send all of a request."""
        sent = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete
        return not sent and not self.transport.is_closing()

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._deadline = self.loop.call_later(_MAX_SECONDS, self.transport.abort)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)


def configure(app: FastAPI) -> uvicorn.Config:
    """Return how to serve the app: connections and the time for a request are limited, and it logs only errors."""
    logging.getLogger("asyncio").addFilter(_is_no_overload)
    return uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        loop="asyncio",
        backlog=MAX_CONNECTIONS,  # asyncio accepts as many at once, before any is closed
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=5,
    )


def _is_no_overload(record: logging.LogRecord) -> bool:
    """Leave out what asyncio logs, with a traceback for each, when there is no file descriptor for a connection."""
    return not record.getMessage().startswith("socket.accept() out of system resource")
