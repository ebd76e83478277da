"""IOPaint's published page, served by a reverse proxy that sends its calls to our server."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2

from tests.support.programs import clients_folder

TIMEOUT_S = 120
HOP_BY_HOP = {"connection", "content-length", "host", "transfer-encoding"}


def page_folder() -> Path:
    """The page's files in the wheel, which is never imported."""
    (folder,) = clients_folder().glob("lib/python*/site-packages/iopaint/web_app")
    return folder


@contextmanager
def iopaint_site(server: str, key: str) -> Iterator[str]:
    """Gives the page's URL. Its calls of `/api/` go to the server.

    key: added to each call, because the page itself has no field for one.
    """

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/"):
                self.forward()
            else:
                super().do_GET()

        def do_POST(self) -> None:
            self.forward()

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {n: v for n, v in self.headers.items() if n.lower() not in HOP_BY_HOP}
            headers["Authorization"] = f"Bearer {key}"
            answer = client.request(self.command, self.path, content=body, headers=headers)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

    handler = functools.partial(Handler, directory=str(page_folder()))
    site = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=site.serve_forever)
    # The server compares Host and Origin, and both name this site in the browser's calls.
    client = httpx2.Client(base_url=server, timeout=TIMEOUT_S, trust_env=False)
    thread.start()
    try:
        yield f"http://127.0.0.1:{site.server_address[1]}"
    finally:
        site.shutdown()
        site.server_close()
        thread.join()
        client.close()
