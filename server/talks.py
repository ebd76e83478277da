"""Talks with a child over its pipes, written once and driven by the event loop or by a thread.

A talk is a generator: it yields a `Wait` where its next read or write has to wait for the child,
and `BLOCKING` before anything that stands still otherwise, as starting a process does. The loop
needs no thread for a talk that goes as usual, and hands all others to one.
"""

import asyncio
import contextvars
import select
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Wait:
    """Until a pipe is ready or its other end closed. A TimeoutError is thrown when it is not.

    event: `POLLIN` or `POLLOUT` of `select`; until: by the clock of `time.monotonic`.
    """

    descriptor: int
    event: int
    until: float

    def is_over(self) -> bool:
        """Wait; False where the time is over first."""
        poll = select.poll()
        poll.register(self.descriptor, self.event)
        return bool(poll.poll(max(0.0, self.until - time.monotonic()) * 1000))


BLOCKING = None

Talk = Generator[Wait | None, None, R]


def run_to_end(talk: Talk[R], wait: Wait | None = None) -> R:
    """Drive a talk from where it is, in a thread; its result. wait: what it yielded last.

    Raises: what the talk raises.
    """
    try:
        while True:
            if wait is None or wait.is_over():
                wait = next(talk)
            else:
                wait = talk.throw(TimeoutError())
    except StopIteration as end:
        result: R = end.value
        return result


class Talker:
    """Drives one talk at a time from the event loop in which it was made, all over the same pipes.

    threads: for talks that block.
    """

    def __init__(self, threads: Executor) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = threads
        self._talk: Talk[Any] | None = None
        self._result: asyncio.Future[Any] | None = None
        self._wait: Wait | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watched: int | None = None

    def begin(
        self, talk: Talk[R], when_over: Callable[[asyncio.Future[R]], None]
    ) -> asyncio.Future[R]:
        """The talk's result. A caller who gives up does not end the talk.

        when_over: called in the event loop with this future, just before the result is there.
        """
        self._talk, self._when_over = talk, when_over
        self._result = result = self._loop.create_future()
        # Callbacks of the loop keep the context of whoever registered them.
        self._context = contextvars.copy_context()
        self._go_on()
        return result

    def close(self) -> None:
        """Watch nothing any more. Who waits for a result is cancelled."""
        self._talk = None
        self._unwatch()
        if self._result is not None:
            self._result.cancel()

    def _go_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._talk is None:  # the child has ended, or speaks unasked: the next talk finds out
            self._unwatch()
            return
        try:
            self._wait = next(self._talk)
        except StopIteration as end:
            self._end(end.value, None)
        except Exception as error:  # noqa: BLE001 - its caller raises it
            self._end(None, error)
        else:
            self._await()

    def _await(self) -> None:
        wait = self._wait
        if wait is None or wait.event != select.POLLIN:
            self._hand_over()
            return
        if self._watched != wait.descriptor:
            self._unwatch()
            self._loop.add_reader(wait.descriptor, self._go_on)
            self._watched = wait.descriptor
        self._timer = self._loop.call_at(wait.until, self._hand_over)

    def _hand_over(self) -> None:
        """To a thread, until the end of the talk."""
        talk, wait = self._talk, self._wait
        if talk is None:
            return
        self._unwatch()  # the thread may close the pipe
        self._talk = None
        answer = self._threads.submit(self._context.run, run_to_end, talk, wait)
        answer.add_done_callback(self._tell)

    def _tell(self, answer: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all who wait
            self._loop.call_soon_threadsafe(self._take, answer)

    def _take(self, answer: Future[Any]) -> None:
        error = answer.exception()
        self._end(None if error else answer.result(), error)

    def _end(self, outcome: Any, error: BaseException | None) -> None:
        result, self._talk, self._result = self._result, None, None
        if result is None:
            return
        self._when_over(result)
        if result.done():
            return
        if error is None:
            result.set_result(outcome)
        else:
            result.set_exception(error)

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._loop.remove_reader(self._watched)
            self._watched = None
