"""An executor whose calls wait for the test."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class HeldBack(Executor):
    """Makes calls when it is told to."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        self._calls.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future

    @property
    def calls(self) -> int:
        """How many it has not made."""
        return len(self._calls)

    def run(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            call()
