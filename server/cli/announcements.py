"""Messages of a starting server: plain lines on a terminal, log events elsewhere.

The first message says what was started and how to stop it, the second that a worker is ready.
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

POLL_S = 0.25

STARTING = frozenset({"worker started", "model loaded", "warmed up", "worker ready"})
"""Log events of a start that a terminal does not show, because the plain lines replace them."""


def announce(settings: Settings, url: str, access: str, more: Mapping[str, str]) -> None:
    """Print or log what has been started. more: further addresses by log event."""
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
    write_lines(
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
    """Print or log, once, that the first of these workers is ready."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(POLL_S):
            if has_ready_worker(store, worker_ids):
                if sys.stderr.isatty():
                    write_lines(f"Ready: {url}")
                else:
                    logger.info("ready", url=url)
                return

    watcher = threading.Thread(target=watch, name="ready")
    if worker_ids:
        watcher.start()
    try:
        yield
    finally:
        is_over.set()
        if worker_ids:
            watcher.join()


def has_ready_worker(store: JobStore, worker_ids: Sequence[str]) -> bool:
    """Whether one of these workers is ready; False where the database is unavailable."""
    with suppress(SQLAlchemyError):
        alive = store.workers.alive()
        return any(each.id in worker_ids and each.state == "ready" for each in alive)
    return False


def write_lines(*lines: str) -> None:
    """Write to standard error in one call, because workers write there too."""
    with suppress(OSError):
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()
