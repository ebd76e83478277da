"""A webhook receiver, and the deliveries it is sent."""

import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2

from server.jobs.store import JobStore
from server.webhooks.deliveries import Attempt
from tests.support.jobs import claim_job
from tests.support.native_calls import create

WAIT_S = 20

Call = tuple[dict[str, str], dict[str, Any]]


def attempt(status: int | None, **changes: Any) -> Attempt:
    return Attempt(started_at=0, duration_s=0.1, status=status, outcome="answered", **changes)


@contextmanager
def receiver(*statuses: int) -> Iterator[tuple[str, "queue.Queue[Call]"]]:
    """A webhook receiver that answers with these statuses in turn; its URL and what it got."""
    calls: queue.Queue[Call] = queue.Queue()
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            calls.put(({k.lower(): v for k, v in self.headers.items()}, json.loads(body)))
            self.send_response(left.pop(0) if left else 200)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def abrupt_receiver(answer: bytes) -> Iterator[str]:
    """A webhook receiver that answers each call and resets the connection at once; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as call:
                    lines = [*iter(call.readline, b"\r\n")]
                    (size,) = [line for line in lines if line.lower().startswith(b"content-length")]
                    call.read(int(size.split(b":")[1]))
                    connection.sendall(answer)
                    linger = struct.pack("ii", 1, 0)  # closing resets the connection
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def finished_job(client: httpx2.Client, store: JobStore, webhook: str | None) -> int:
    job = claim_job(store, create(client, webhook=webhook)["id"])
    store.finish(job, [False, False])
    return job.id


def deliveries_of(client: httpx2.Client, job_id: int, attempts: int) -> dict[str, Any]:
    """The job's call, once it was tried so often."""
    limit = time.monotonic() + 3 * WAIT_S
    while time.monotonic() < limit:  # each a round trip; the row is all there is to see
        listed = client.get(f"/api/jobs/{job_id}/deliveries").json()["deliveries"]
        if listed and len(listed[0]["attempts"]) == attempts:
            call: dict[str, Any] = listed[0]
            return call
    raise AssertionError(listed)
