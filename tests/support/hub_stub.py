"""A model hub of our own on loopback, which counts what it is asked."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True)
class Hub:
    """One repository under any name.

    asked: the path of every request so far. ranges: the `Range` header of those that had one.
    breaks: files whose next download ends in the middle.
    """

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    breaks: set[str] = field(default_factory=set)

    def files(self) -> dict[str, Path]:
        """The repository's files by their path in it."""
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def environment(self, cache: Path) -> dict[str, str]:
        """What sends huggingface_hub here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """The files of a folder as a repository's only commit."""
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            path = unquote(urlsplit(self.path).path)
            if "/tree/" in path:
                self.tell(json.dumps([entry(*each) for each in hub.files().items()]).encode())
            elif path.startswith("/api/models/"):
                name = path.removeprefix("/api/models/").split("/revision")[0]
                siblings = [{"rfilename": each} for each in hub.files()]
                known = {"id": name, "sha": COMMIT, "siblings": siblings}
                self.tell(json.dumps(known).encode())
            elif (file := hub.files().get(path.partition(f"/resolve/{COMMIT}/")[2])) is not None:
                content = file.read_bytes()
                # The real one names large files so, which are those with weights.
                is_large = file.suffix in (".safetensors", ".bin")
                digest = hashlib.sha256(content).hexdigest() if is_large else digest_of(content)
                self.tell_file(file, content, digest)
            else:
                self.send_error(404)

        def tell_file(self, file: Path, content: bytes, digest: str) -> None:
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range", "")
            if asked:
                hub.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content = content[start:]
            name = file.relative_to(hub.folder).as_posix()
            is_broken = self.command == "GET" and name in hub.breaks
            hub.breaks -= {name} if is_broken else set()
            length = len(content) // 2 if is_broken else len(content)
            self.tell(content, length, 206 if asked else 200, **headers)

        def tell(
            self, content: bytes, sent: int | None = None, status: int = 200, **headers: str
        ) -> None:
            """sent: bytes after which the connection breaks off; None for all."""
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:sent])
                self.close_connection = sent not in (None, len(content))

        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(name: str, path: Path) -> dict[str, Any]:
    """A file in a listing."""
    oid = digest_of(path.read_bytes())
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


def digest_of(content: bytes) -> str:
    """What names a content; any digest of that length will do."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
