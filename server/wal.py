"""Keeps SQLite's write-ahead log short, beside those who write.

By itself SQLite moves the log's pages to the database within a commit, which then waits for the
disk three times. The log begins anew only where all of it was moved before anybody writes again:
with several processes that hardly happens, and each commit moves pages while the log grows and
grows.
"""

from typing import Any

from sqlalchemy import Engine

from server.database import BUSY_TIMEOUT_MS

LOOK_S = 0.1

MOVE_PAGES = 4_000
"""Of 4 KiB, that are moved together. A new job takes 24."""

RESTART_PAGES = 16_000
"""64 MiB, after which writers are held off until the log begins anew."""

PATIENCE_MS = 50
"""For writers and readers to make way; else it is tried again at the next look."""


def shorten_log(
    engine: Engine, move_pages: int = MOVE_PAGES, restart_pages: int = RESTART_PAGES
) -> None:
    """Have a look, and do what is needed. For a SQLite; one without such a log is left alone.

    Raises: SQLAlchemyError, and the driver's own errors.
    """
    connection = engine.raw_connection()
    try:
        raw: Any = connection.driver_connection
        raw.execute(f"PRAGMA busy_timeout = {PATIENCE_MS}")
        try:
            pages, moved = checkpoint(raw, "NOOP")
            if pages - moved > move_pages:
                pages, moved = checkpoint(raw, "PASSIVE")
            # One that was moved as a whole begins anew with whoever writes next.
            if pages > restart_pages and pages > moved:
                checkpoint(raw, "RESTART")
        finally:
            raw.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    finally:
        connection.close()


def checkpoint(connection: Any, mode: str) -> tuple[int, int]:
    """Pages in the log, and how many of them were moved to the database; -1 where there is none."""
    _, pages, moved = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
    return pages, moved
