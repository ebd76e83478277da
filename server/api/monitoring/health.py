"""`Health`: whether the database and the file store accept writes of this process.

A call that fails marks its store as failing until a probe write has succeeded. So an idle server
notices that a disk has room again, and a healthy object store costs no probe writes.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum

from sqlalchemy import Engine, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from server.core.errors import StorageUnavailable
from server.core.fairness import FairSemaphore
from server.core.logs import get_logger
from server.storage.database import DatabaseFileGone

logger = get_logger(__name__)

PROBE_S = 1.0
"""Seconds between two probe writes to a failing store."""

PROBE_TIMEOUT_S = 2.0
"""A probe write that takes longer has failed."""

# The statement changes no value, but it takes the write lock and is committed like any other.
WRITE = text("UPDATE alembic_version SET version_num = version_num")

DATABASE_ERRORS = (OperationalError, InterfaceError, InternalError, PoolTimeout)


class Store(StrEnum):
    """The stores that can fail, named as readiness reports them."""

    DATABASE = "database"
    FILES = "file store"


class Health:
    """Which stores fail. Used on the event loop only.

    probes: a probe write for each store, which raises when the store fails.
    check_file: quick; raises DatabaseFileGone once the database file is not the opened one.
    """

    def __init__(
        self, probes: Mapping[Store, Callable[[], None]], check_file: Callable[[], None]
    ) -> None:
        self._probes = probes
        self._check_file = check_file
        self._failing: set[Store] = set()
        self._is_file_gone = False
        self._has_failed = asyncio.Event()
        # A store that hangs delays no other store, and gets no second probe write.
        self._slots = FairSemaphore(len(Store), per_owner=1)

    @property
    def failing(self) -> list[Store]:
        """The stores that do not accept writes now, sorted."""
        return sorted(self._failing)

    @property
    def problems(self) -> list[str]:
        """What fails, in sentences without internal details."""
        return [
            "the database file was moved, removed or replaced: restart the server"
            if store is Store.DATABASE and self._is_file_gone
            else f"the {store} fails"
            for store in self.failing
        ]

    @property
    def is_file_gone(self) -> bool:
        """The database file was replaced, so keys and jobs of the open one must not be used."""
        return self._is_file_gone

    def refuse_writes(self) -> None:
        """Fail fast while a store fails. Raises: StorageUnavailable."""
        if self._failing:
            raise StorageUnavailable(f"failing: {', '.join(self.failing)}", is_logged=True)

    def record_failure(self, store: Store, error: Exception) -> None:
        """Mark a store as failing; `run` then probes it until a write succeeds."""
        is_new = store not in self._failing
        if isinstance(error, DatabaseFileGone) and not self._is_file_gone:
            self._is_file_gone = is_new = True
        if is_new:
            detail = str(error) if self._is_file_gone else store
            logger.error("store fails", detail=detail, error=type(error).__name__)
            self._failing.add(store)
            self._has_failed.set()

    @contextmanager
    def recording_failures(self) -> Iterator[None]:
        """Record failures of a store that the block raises, but not the caller's own errors."""
        try:
            yield
        except DATABASE_ERRORS as error:
            self.record_failure(Store.DATABASE, error)
            raise
        except StorageUnavailable as error:
            self.record_failure(Store.FILES, error)
            raise

    async def run(self) -> None:
        """Probe the failing stores and check the database file, until cancelled."""
        while True:
            self._has_failed.clear()
            for store in self.failing:
                await self._probe(store)
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    await self._has_failed.wait()
            with suppress(DatabaseFileGone), self.recording_failures():
                self._check_file()

    async def _probe(self, store: Store) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._slots.acquire(store)
                await self._slots.use_in_thread(store, self._probes[store])
        except (SQLAlchemyError, StorageUnavailable, TimeoutError):
            return
        self._failing.discard(store)
        self._is_file_gone = self._is_file_gone and store is not Store.DATABASE
        logger.info("store works again", detail=store)


def write_nothing(engine: Engine) -> None:
    """Commit a write transaction that changes no value. Raises: SQLAlchemyError."""
    with engine.begin() as connection:
        connection.execute(WRITE)
