"""The outside world on loopback: a webhook receiver and an image host in one.

The first part of a request's path says what the host does.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.http_stub import png_bytes, response
from tests.support.proxies import LoopThread, close_server, reset_connection

IMAGE = png_bytes()
ENDLESS_CHUNK = b"x" * 65_536
DRIP_S = 0.3


@dataclass(frozen=True, slots=True)
class Call:
    """A webhook call as it came in. body: None where it is no JSON."""

    path: str
    webhook_id: str
    body: Any
    at: float


@dataclass(slots=True)
class Host:
    """A running stub. calls: every POST, in order. gets: how many GET requests there were."""

    port: int = 0
    gets: int = 0
    calls: list[Call] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def calls_for(self, job_id: int) -> list[Call]:
        """The webhook calls that told of a job."""
        return [each for each in self.calls if (each.body or {}).get("id") == job_id]


@contextmanager
def running_host(thread: LoopThread) -> Iterator[Host]:
    """Images by GET, webhooks by POST; see `_behave` for the modes."""
    host = Host()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
            }
            content = await reader.readexactly(int(headers.get("content-length", 0)))
            tries = 0
            if method == "GET":
                host.gets += 1
            else:
                tries = sum(call.path == path for call in host.calls)
                body = json.loads(content) if content else None
                host.calls.append(Call(path, headers.get("webhook-id", ""), body, time.time()))
            mode = path.partition("?")[0].split("/")[1]
            if mode == "silent":
                await reader.read()  # until the client has gone
            await _behave(mode, tries, host, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or all is over
        finally:
            writer.close()

    server = thread.call(asyncio.start_server(serve, "127.0.0.1", 0))
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        thread.call(close_server(server))


async def _behave(mode: str, tries: int, host: Host, writer: asyncio.StreamWriter) -> None:
    """Answer as the mode says. tries: earlier calls of the same path."""
    match mode:
        case "image":
            writer.write(response("200 OK", "Content-Type: image/png", body=IMAGE))
        case "ok":
            writer.write(response("200 OK"))
        case "once500" if tries:
            writer.write(response("200 OK"))
        case "500" | "once500":
            writer.write(response("500 Internal Server Error"))
        case "301":
            writer.write(response("301 Moved Permanently", f"Location: {host.url}/ok/redirected"))
        case "404":
            writer.write(response("404 Not Found"))
        case "410":
            writer.write(response("410 Gone"))
        case "429":
            writer.write(response("429 Too Many Requests", "Retry-After: 3600"))
        case "page":
            writer.write(response("200 OK", "Content-Type: image/png", body=b"<!doctype html>"))
        case "loop":
            writer.write(response("302 Found", f"Location: {host.url}/loop"))
        case "inward":
            writer.write(response("302 Found", "Location: http://169.254.169.254/latest/meta-data"))
        case "lying":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99000000000\r\n\r\nx")
        case "half":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        case "reset":
            reset_connection(writer)
        case "drip":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n")
            await _repeat(writer, b"x", DRIP_S)
        case "endless" | "huge":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await _repeat(writer, ENDLESS_CHUNK, 0)
    await writer.drain()


async def _repeat(writer: asyncio.StreamWriter, chunk: bytes, pause_s: float) -> None:
    """Until the other side has had enough."""
    while True:
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(pause_s)
