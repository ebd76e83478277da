"""Reverse proxies in front of the server: with IOPaint's page, and under the vendor's name."""

import functools
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tests.support.certificates import server_tls
from tests.support.programs import clients_folder

TIMEOUT_S = 120
HOP_BY_HOP = {"connection", "content-length", "transfer-encoding"}
VENDOR = "stablediffusionapi.com"


class ForwardingHandler(SimpleHTTPRequestHandler):
    """Serves a folder, and sends calls below one path on to a server.

    client: knows the server. added: headers of each call that is sent on.
    """

    def __init__(
        self,
        *arguments: Any,
        client: httpx2.Client,
        path: str,
        added: Mapping[str, str],
        **more: Any,
    ) -> None:
        self.client, self.below, self.added = client, path, added
        super().__init__(*arguments, **more)

    def do_GET(self) -> None:
        if self.path.startswith(self.below):
            self.forward()
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.forward()

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {n: v for n, v in self.headers.items() if n.lower() not in HOP_BY_HOP}
        # A client may send an absolute URL, which httpx would dial.
        target = urlsplit(self.path)._replace(scheme="", netloc="").geturl()
        answer = self.client.request(
            self.command, target, content=body, headers={**headers, **self.added}
        )
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name not in HOP_BY_HOP | {"content-encoding"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_arguments: Any) -> None:
        """Quiet."""


@contextmanager
def iopaint_site(server: str, key: str) -> Iterator[str]:
    """Gives the URL of IOPaint's page. Its calls below `/api/` go to the server.

    key: added to each call, because the page itself has no field for one.
    """
    (folder,) = clients_folder().glob("lib/python*/site-packages/iopaint/web_app")
    added = {"Authorization": f"Bearer {key}"}
    with running_proxy(server, path="/api/", added=added, directory=str(folder)) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def vendor_host(server: str, certificate: Path) -> Iterator[int]:
    """Gives the port of a host with TLS that answers under the vendor's name."""
    added = {"X-Forwarded-Proto": "https"}
    with running_proxy(server, server_tls(certificate), path="/", added=added) as port:
        yield port


@contextmanager
def running_proxy(server: str, tls: ssl.SSLContext | None = None, **options: Any) -> Iterator[int]:
    """options: of the handler."""
    client = httpx2.Client(base_url=server, timeout=TIMEOUT_S, trust_env=False)
    handler = functools.partial(ForwardingHandler, client=client, **options)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        proxy.socket = tls.wrap_socket(proxy.socket, server_side=True)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield proxy.server_address[1]
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        client.close()
