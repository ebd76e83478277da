"""What a server says of itself when it starts: plain lines where a person looks on, else log lines.

A person is told at once what was started and how to stop it, and later that it is ready.
"""

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version

from sqlalchemy.exc import SQLAlchemyError

from server.core.logs import get_logger
from server.core.settings import Settings
from server.jobs.store import JobStore

logger = get_logger(__name__)

LOOK_S = 0.25
"""Between two looks whether a worker is ready."""

STARTING = frozenset({"worker started", "model loaded", "warmed up", "worker ready"})
"""Events of a start that the lines for a person stand for."""


def announce(settings: Settings, url: str, access: str, more: Mapping[str, str]) -> None:
    """Say what has been started. more: further addresses by what the log says of them."""
    devices = [*dict.fromkeys(settings.worker_devices)]
    facts = {
        "version": version("inpaint-server"),
        "model": ", ".join(settings.offered_models),
        "device": ", ".join(devices),
        "data_dir": str(settings.data_dir),
        "access": access,
    }
    if not sys.stderr.isatty():
        logger.info("listening", url=url, **facts)
        for event, address in more.items():
            logger.info(event, url=address)
        return
    on_devices = f"on {facts['device']}" if devices else "no workers here"
    say(
        f"inpaint-server {facts['version']}",
        f"  address      {url}",
        *(f"  {'figures':11}  {address}/metrics" for address in more.values()),
        f"  model        {facts['model']}, {on_devices}",
        f"  data folder  {facts['data_dir']}",
        f"  access       {access}",
        "Press Ctrl-C to stop." if not devices else "Loading the model; press Ctrl-C to stop.",
    )


@contextmanager
def ready_announced(store: JobStore, worker_ids: Sequence[str], url: str) -> Iterator[None]:
    """Say once that the first of these workers is ready."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_S):
            if is_one_ready(store, worker_ids):
                if sys.stderr.isatty():
                    say(f"Ready: {url}")
                else:
                    logger.info("ready", url=url)
                return

    watcher = threading.Thread(target=look, name="ready")
    if worker_ids:
        watcher.start()
    try:
        yield
    finally:
        is_over.set()
        if worker_ids:
            watcher.join()


def is_one_ready(store: JobStore, worker_ids: Sequence[str]) -> bool:
    """False also where the database is away."""
    with suppress(SQLAlchemyError):
        alive = store.workers.alive()
        return any(each.id in worker_ids and each.state == "ready" for each in alive)
    return False


def say(*lines: str) -> None:
    """To a person on standard error, in one piece: workers write there too."""
    with suppress(OSError):
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()
