"""A vendor of our own on loopback, for shadow mode."""

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class VendorCall:
    """headers: names in lower case."""

    path: str
    headers: dict[str, str]
    fields: dict[str, Any]


@dataclass(slots=True)
class FakeVendor:
    """What it got, and what it answers: any text as the body, once `may_answer` is set.

    missing_bytes: of the declared body, when it closes the connection.
    """

    url: str = ""
    status: int = 200
    answer: str = "{}"
    missing_bytes: int = 0
    calls: "queue.Queue[VendorCall]" = field(default_factory=queue.Queue)
    may_answer: threading.Event = field(default_factory=threading.Event)


@contextmanager
def running_vendor() -> Iterator[FakeVendor]:
    """A vendor that answers every POST."""
    vendor = FakeVendor()
    vendor.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            vendor.calls.put(VendorCall(self.path, headers, fields))
            vendor.may_answer.wait()
            body = vendor.answer.encode()
            with suppress(ConnectionError):  # the server has stopped meanwhile
                self.send_response(vendor.status)
                self.send_header("Content-Length", str(len(body) + vendor.missing_bytes))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    vendor.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield vendor
    finally:
        vendor.may_answer.set()
        server.shutdown()
        server.server_close()
        thread.join()
