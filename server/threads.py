"""Threads and the event loop: calls made in threads, and results of threads that are waited for.

`concurrent.futures` takes a fifth of the time of a hop through anyio, and most calls make one. The
loop is told by us: each of asyncio's own futures around those would be one more turn of the loop.
"""

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """So many calls at a time. Use as a context manager: leaving waits for the calls under way.

    A caller that is cancelled does not wait for its call, which goes on unless it had not begun.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result, without blocking the event loop. Log lines keep the caller's context."""
        bound = functools.partial(function, *args, **kwargs)
        answer = self._pool.submit(contextvars.copy_context().run, bound)
        try:
            await settled(answer)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return answer.result()

    def __enter__(self) -> "Threads":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def when_done(futures: Sequence[Future[Any]], then: Callable[[], None]) -> None:
    """Call something once all are there, whatever they are; in the thread that ends the last."""
    left, lock = len(futures), threading.Lock()
    if not left:
        then()

    def count_down(_: object) -> None:
        nonlocal left
        with lock:
            left -= 1
            is_last = left == 0
        if is_last:
            then()

    for future in futures:
        future.add_done_callback(count_down)


def nothing_more() -> Sequence[Future[Any]]:
    """No futures."""
    return ()


def all_of(
    futures: Sequence[Future[None]], more: Callable[[], Sequence[Future[None]]] = nothing_more
) -> Future[None]:
    """Is there once all are; raises what the first raises that fails.

    more: asked for others, in a thread, once those are there.
    """
    together: Future[None] = Future()

    def end() -> None:
        every = [*futures, *more()]
        errors = [error for future in every if (error := future.exception()) is not None]
        if errors:
            together.set_exception(errors[0])
        else:
            together.set_result(None)

    when_done(futures, lambda: when_done(more(), end))
    return together


async def settled(
    *futures: Future[Any],
    more: Callable[[], Sequence[Future[Any]]] = nothing_more,
    first: Callable[[], None] | None = None,
) -> None:
    """Wait until all are there, whatever they are; the event loop is woken once.

    more: asked for others to wait for, in a thread, once those are there.
    first: called in the event loop before the end, also where the caller was cancelled meanwhile.
    """
    loop = asyncio.get_running_loop()
    are_there: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if first is not None:
            first()
        if not are_there.done():
            are_there.set_result(None)

    def end() -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all who wait
            loop.call_soon_threadsafe(tell)

    when_done(futures, lambda: when_done(more(), end))
    await are_there
