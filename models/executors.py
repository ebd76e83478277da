"""Where the host does its part of a picture: in threads beside the device, or in between."""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

BACKGROUND_THREADS = 2
"""One pastes a picture while another makes the canvas of a new generation. None of them waits for
the device."""


class InlineExecutor(Executor):
    """Makes calls at once, in the thread that submits them."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - `Future.result` raises it
            future.set_exception(error)
        return future


def background_of(device: torch.device, *, is_reproducible: bool) -> Executor:
    """The background of an engine for this device, the current one of its type.

    On a GPU it is threads. Where pictures must be reproducible there are none, because settings of
    torch that are in force for one thread would be so for all.
    """
    if device.type != "cuda" or is_reproducible:
        return InlineExecutor()
    # A thread begins with the first device as its current one.
    current = torch.cuda.current_device()
    return ThreadPoolExecutor(
        BACKGROUND_THREADS, "background", initializer=torch.cuda.set_device, initargs=(current,)
    )
