"""An object store on loopback that can go away: as much of S3 as the file store asks for."""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.http_stub import response
from tests.support.proxies import LoopThread, close_server, reset_connection

NAME = "pictures"
HANG_LOOK_S = 0.05
WRITTEN = "2026-01-01T00:00:00.000Z"
STAMPS = ('ETag: "1"', "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT")


@dataclass(slots=True)
class Bucket:
    """files: by key. kinds: their content types. is_away: every request is reset.

    is_hung: requests are read and not answered, until it is well again. tries: those that were
    reset or hung. calls: answered ones by method.
    """

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    is_away: bool = False
    is_hung: bool = False
    tries: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def environment(self) -> dict[str, str]:
        """For a server that is to keep its files here."""
        return {
            "INPAINT_STORAGE__URL": f"s3://{NAME}",
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
        }

    def answer(self, method: str, target: str, content: bytes, kind: str = "") -> bytes:
        """The answer to a request for `/bucket/key`, or `/bucket?query`."""
        url = urlsplit(target)
        self.calls[method] += 1
        key, query = unquote(url.path.removeprefix(f"/{NAME}").lstrip("/")), parse_qs(url.query)
        if method == "PUT":
            self.files[key], self.kinds[key] = content, kind
            return response("200 OK", *STAMPS)
        if method == "DELETE":
            self.files.pop(key, None)
            return response("204 No Content")
        if method == "POST":
            gone = re.findall("<Key>([^<]*)</Key>", content.decode())
            for each in gone:
                self.files.pop(each, None)
            told = "".join(f"<Deleted><Key>{each}</Key></Deleted>" for each in gone)
            return response("200 OK", body=f"<DeleteResult>{told}</DeleteResult>".encode())
        if not key:
            return response("200 OK", body=self._listing(query.get("prefix", [""])[0]).encode())
        if key not in self.files:
            return response("404 Not Found", body=b"<Error><Code>NoSuchKey</Code></Error>")
        return response("200 OK", *STAMPS, body=self.files[key])

    def _listing(self, prefix: str) -> str:
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{WRITTEN}</LastModified>"
            f"<Size>{len(content)}</Size><ETag>1</ETag></Contents>"
            for key, content in self.files.items()
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"


@contextmanager
def running_bucket(thread: LoopThread) -> Iterator[Bucket]:
    """A bucket on a free port."""
    bucket = Bucket()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)\r\ncontent-length: *(\d+)", head)
                content = await reader.readexactly(int(length[1]) if length else 0)
                if bucket.is_away:
                    bucket.tries += 1
                    reset_connection(writer)
                    return
                if bucket.is_hung:
                    bucket.tries += 1
                    while bucket.is_hung:  # noqa: ASYNC110 - another thread ends it
                        await asyncio.sleep(HANG_LOOK_S)
                method, target, _ = head.split(" ", 2)
                kind = re.search(r"(?i)\r\ncontent-type: *([^\r]+)", head)
                writer.write(bucket.answer(method, target, content, kind[1] if kind else ""))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or all is over
        finally:
            writer.close()

    server = thread.call(asyncio.start_server(serve, "127.0.0.1", 0))
    bucket.port = server.sockets[0].getsockname()[1]
    try:
        yield bucket
    finally:
        thread.call(close_server(server))
