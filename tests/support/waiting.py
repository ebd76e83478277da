"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable

POLL_S = 0.05


def until(condition: Callable[[], bool], within_s: float, what: str) -> float:
    """Poll the condition; the seconds until it held. Raises: AssertionError after `within_s`."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > within_s:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(POLL_S)
    return time.monotonic() - started
