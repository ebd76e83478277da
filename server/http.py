"""The HTTP server around the application: listening socket, limits, and an orderly end."""

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.settings import Settings

BACKLOG = 2_048
GRACE_S = 30
"""From SIGTERM until connections that are still open are cut."""


class Server(uvicorn.Server):
    """uvicorn, made to let waiting clients go when it is told to stop."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                forwarded_allow_ips=list(settings.forwarded_allow_ips),
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    def run_until_stopped(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, then return."""
        # uvicorn raises the signal again once it is done, for handlers that stood before its own;
        # with the default ones the process would die here, before its workers are stopped.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self.run(sockets=[listener])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Held requests get their "processing" answer now: uvicorn waits for them to end."""
        services = getattr(self._app.state, "services", None)
        if services is not None:
            services.waiters.release_all()
            services.followers.release_all()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    return listener
