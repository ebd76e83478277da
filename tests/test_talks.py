"""Talks over pipes: driven by the event loop as long as nothing blocks, else by a thread."""

import asyncio
import contextvars
import os
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest

from server.talks import BLOCKING, Talk, Talker, Wait, run_to_end

PATIENCE_S = 60.0
SHORT_S = 0.01
REQUEST = contextvars.ContextVar("request", default="nobody's")


class NoThreads(Executor):
    """For talks that need none."""

    def submit(self, *_arguments: Any, **_named: Any) -> Any:
        raise AssertionError("a thread was asked for")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Whose reading end does not block; and the writing end."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    for each in (reading, writing):
        try:
            os.close(each)
        except OSError:  # by the test itself
            continue


def read(descriptor: int, wait_s: float = PATIENCE_S) -> Talk[bytes]:
    """What comes next; `b"late"` where nothing does."""
    while True:
        try:
            return os.read(descriptor, 100)
        except BlockingIOError:
            try:
                yield Wait(descriptor, select.POLLIN, time.monotonic() + wait_s)
            except TimeoutError:
                return b"late"


def read_in_thread(descriptor: int) -> Talk[tuple[bytes, str, str]]:
    """The same, from where it would block; who read it, and for whom."""
    yield BLOCKING
    content = yield from read(descriptor)
    return content, threading.current_thread().name, REQUEST.get()


def nothing(_: object) -> None:
    """Follows."""


async def settle() -> None:
    """Let the event loop turn a few times."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_thread_waits_and_is_told_of_the_time(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"there")
    assert run_to_end(read(reading)) == b"there"
    assert run_to_end(read(reading, SHORT_S)) == b"late"
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(run_to_end, read(reading))
        os.write(writing, b"later")
        assert answer.result(PATIENCE_S) == b"later"
    assert run_to_end(read_in_thread(writing_end_closed(pipe)))[0] == b""


def writing_end_closed(pipe: tuple[int, int]) -> int:
    """The reading end of a pipe whose other end is closed."""
    os.close(pipe[1])
    return pipe[0]


def test_loop_needs_no_thread_for_talks_that_only_wait(pipe: tuple[int, int]) -> None:
    reading, writing = pipe

    async def run() -> list[bytes]:
        talker, heard = Talker(NoThreads()), []
        for word in (b"one", b"two"):
            result = talker.begin(read(reading), nothing)
            await settle()
            assert not result.done()
            os.write(writing, word)
            heard.append(await result)
        os.write(writing, b"three")
        heard.append(await talker.begin(read(reading), nothing))
        talker.close()
        return heard

    assert asyncio.run(run()) == [b"one", b"two", b"three"]


def test_talk_goes_on_in_a_thread_from_where_it_blocks(pipe: tuple[int, int]) -> None:
    reading, writing = pipe

    async def run() -> tuple[bytes, str, str]:
        with ThreadPoolExecutor(1, "beside") as threads:
            talker = Talker(threads)
            os.write(writing, b"for the first")
            REQUEST.set("the first")
            await talker.begin(read_in_thread(reading), nothing)
            REQUEST.set("the second")
            result = talker.begin(read_in_thread(reading), nothing)
            REQUEST.set("the third")
            os.write(writing, b"for the second")
            return await result

    assert asyncio.run(run()) == (b"for the second", "beside_0", "the second")


def test_time_is_over_in_the_loop_too(pipe: tuple[int, int]) -> None:
    async def run() -> bytes:
        with ThreadPoolExecutor(1) as threads:
            return await Talker(threads).begin(read(pipe[0], SHORT_S), nothing)

    assert asyncio.run(run()) == b"late"


def test_who_cannot_write_is_waited_for_in_a_thread(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    size = 4 * 2**20

    def write() -> Talk[str]:
        rest = memoryview(bytes(size))
        while rest:
            try:
                rest = rest[os.write(writing, rest) :]
            except BlockingIOError:
                yield Wait(writing, select.POLLOUT, time.monotonic() + PATIENCE_S)
        return threading.current_thread().name

    async def run() -> str:
        with ThreadPoolExecutor(1, "beside") as threads:
            result = Talker(threads).begin(write(), nothing)
            read_bytes = 0
            while read_bytes < size:
                await asyncio.sleep(0)
                with_content = select.select([reading], [], [], PATIENCE_S)[0]
                assert with_content
                read_bytes += len(os.read(reading, 2**20))
            return await result

    assert asyncio.run(run()) == "beside_0"


def test_errors_come_from_the_loop_and_from_the_thread() -> None:
    def fail(*waits: Wait | None) -> Talk[None]:
        yield from waits
        raise KeyError("a fault")

    async def run(*waits: Wait | None) -> None:
        with ThreadPoolExecutor(1) as threads:
            await Talker(threads).begin(fail(*waits), nothing)

    for waits in ((), (BLOCKING,)):
        with pytest.raises(KeyError, match="a fault"):
            asyncio.run(run(*waits))


@pytest.mark.parametrize("word", [b"in time", b""], ids=["answer", "end"])
def test_talk_ends_though_its_caller_is_gone(word: bytes, pipe: tuple[int, int]) -> None:
    reading, writing = pipe

    async def run() -> None:
        ended: asyncio.Queue[asyncio.Future[bytes]] = asyncio.Queue()
        talker = Talker(NoThreads())
        result = talker.begin(read(reading), ended.put_nowait)

        async def wait() -> bytes:
            return await result

        caller = asyncio.create_task(wait())
        await settle()
        caller.cancel()
        await settle()
        assert ended.empty()
        if word:
            os.write(writing, word)
        else:
            os.close(writing)
        assert await ended.get() is result
        assert result.cancelled()
        talker.close()

    asyncio.run(run())


@pytest.mark.parametrize("is_open", [True, False], ids=["speaks", "ends"])
def test_who_speaks_unasked_keeps_nobody_busy(is_open: bool, pipe: tuple[int, int]) -> None:
    reading, writing = pipe

    async def run() -> None:
        talker = Talker(NoThreads())
        result = talker.begin(read(reading), nothing)
        os.write(writing, b"asked")
        assert await result == b"asked"
        if is_open:
            os.write(writing, b"unasked")
        else:
            os.close(writing)
        await settle()
        # Nobody watches the pipe: there is nothing to be taken off.
        assert not asyncio.get_running_loop().remove_reader(reading)
        assert await talker.begin(read(reading), nothing) == (b"unasked" if is_open else b"")
        talker.close()

    asyncio.run(run())


def test_closing_cancels_who_waits(pipe: tuple[int, int]) -> None:
    async def run() -> None:
        talker = Talker(NoThreads())
        result = talker.begin(read(pipe[0]), nothing)
        await settle()
        talker.close()
        assert result.cancelled()
        os.write(pipe[1], b"too late")
        await settle()

    asyncio.run(run())


def test_loop_may_end_before_its_threads(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with ThreadPoolExecutor(1) as threads:

        async def run() -> None:
            Talker(threads).begin(read_in_thread(reading), nothing)

        asyncio.run(run())
        os.write(writing, b"for nobody")
