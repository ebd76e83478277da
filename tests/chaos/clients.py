"""Clients that keep asking while something is broken."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2

from tests.chaos.scripts import Script
from tests.chaos.site import Site


@contextmanager
def asking(site: Site, pause_s: float = 0.1, **changes: Any) -> Iterator[None]:
    """A client that asks for a short job again and again; refusals and cut lines are normal."""
    is_over = threading.Event()

    def ask() -> None:
        count = 0
        while not is_over.wait(pause_s):
            count += 1
            try:
                # Unrepeatable: a job that was finished twice shows.
                script = Script(tag=f"asked{count}", step_s=0.02, unrepeatable=True)
                site.submit(script, seed=count, **changes)
            except httpx2.HTTPError:
                continue

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def side_by_side(calls: list[Callable[[], Any]], threads: int = 16) -> list[Any]:
    """The results of calls made at the same time, in order."""
    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
