"""An event loop in a thread of its own, and a TCP proxy on it that cuts lines."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop beside the harness; use as a context manager."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> "LoopThread":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.call(_cancel_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def call(self, work: Coroutine[Any, Any, T], within_s: float = 30) -> T:
        """Run on the loop, and wait for the result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(within_s)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def close_server(server: asyncio.Server) -> None:
    server.close()


def reset_connection(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class TcpProxy:
    """Passes bytes on to a target until told otherwise.

    latency_s: added to every piece. is_cut: nothing passes and no connection is answered, while
    none is closed: a line that is down.
    """

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._connect = connect
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.latency_s = 0.0
        self.port = 0

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> asyncio.Server:
        """Listen, on a free port unless told which."""
        server = await asyncio.start_server(self._serve, host, port)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def cut(self) -> None:
        """From now on the line is down."""
        self._open.clear()

    async def heal(self) -> None:
        """What was held back passes now."""
        self._open.set()

    async def reset(self) -> None:
        """End all connections with RST."""
        for writer in self._writers:
            reset_connection(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            far_reader, far_writer = await self._connect()
        except OSError:
            writer.close()
            return
        both = {writer, far_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass_on(reader, far_writer))
                tasks.create_task(self._pass_on(far_reader, writer))
        except* OSError:
            pass
        finally:
            self._writers -= both
            for each in both:
                each.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(65_536):
            await asyncio.sleep(self.latency_s)
            await self._open.wait()
            writer.write(content)
            await writer.drain()
        writer.close()


@contextmanager
def running_proxy(
    thread: LoopThread, connect: Callable[[], Coroutine[Any, Any, Any]]
) -> Iterator[TcpProxy]:
    """connect: opens the connection to the target, such as `asyncio.open_connection`."""

    async def start() -> tuple[TcpProxy, asyncio.Server]:
        proxy = TcpProxy(connect)
        return proxy, await proxy.start()

    proxy, server = thread.call(start())
    try:
        yield proxy
    finally:
        thread.call(close_server(server))
