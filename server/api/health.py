"""`Health`: whether the database and the file store take what this process has to write.

A store counts as failing from a call that failed until a probe write has succeeded, so that an
idle server notices that a disk has room again, and costs an object store nothing while all is well.
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
"""Between two probe writes of a store that fails."""

PROBE_PATIENCE_S = 2.0
"""For a probe write: one that takes longer has failed."""

# It changes nothing, but takes the lock and is written like any other change.
WRITE = text("UPDATE alembic_version SET version_num = version_num")

DATABASE_ERRORS = (OperationalError, InterfaceError, InternalError, PoolTimeout)


class Store(StrEnum):
    """What can fail, in words for readiness."""

    DATABASE = "database"
    FILES = "file store"


class Health:
    """Belongs to the event loop.

    probes: a write to each store; what they raise is a failure. check_file: raises DatabaseFileGone
    where the database file was moved, removed or replaced; it is quick.
    """

    def __init__(
        self, probes: Mapping[Store, Callable[[], None]], check_file: Callable[[], None]
    ) -> None:
        self._probes = probes
        self._check_file = check_file
        self._failing: set[Store] = set()
        self._is_file_gone = False
        self._has_failed = asyncio.Event()
        # A store that hangs holds up no other store, and gets no second probe.
        self._slots = FairSemaphore(len(Store), per_owner=1)

    @property
    def failing(self) -> list[Store]:
        """The stores that do not take writes now."""
        return sorted(self._failing)

    @property
    def troubles(self) -> list[str]:
        """What fails, in words for anybody."""
        return [
            "the database file was moved, removed or replaced: restart the server"
            if store is Store.DATABASE and self._is_file_gone
            else f"the {store} fails"
            for store in self.failing
        ]

    @property
    def is_file_gone(self) -> bool:
        """The database is another one now: keys and jobs of the open one must not count."""
        return self._is_file_gone

    def refuse_writes(self) -> None:
        """At once, where they would be waited for in vain. Raises: StorageUnavailable."""
        if self._failing:
            raise StorageUnavailable(f"failing: {', '.join(self.failing)}", is_logged=True)

    def note(self, store: Store, error: Exception) -> None:
        """A call has failed; probe writes begin at once, and end that again."""
        is_news = store not in self._failing
        if isinstance(error, DatabaseFileGone) and not self._is_file_gone:
            self._is_file_gone = is_news = True
        if is_news:
            detail = str(error) if self._is_file_gone else store
            logger.error("store fails", detail=detail, error=type(error).__name__)
            self._failing.add(store)
            self._has_failed.set()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what a call inside raises, unless what was asked for may be the reason."""
        try:
            yield
        except DATABASE_ERRORS as error:
            self.note(Store.DATABASE, error)
            raise
        except StorageUnavailable as error:
            self.note(Store.FILES, error)
            raise

    async def run(self) -> None:
        """Probe the stores that fail, and look after the database file, until cancelled."""
        while True:
            self._has_failed.clear()
            for store in self.failing:
                await self._probe(store)
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    await self._has_failed.wait()
            with suppress(DatabaseFileGone), self.noting():
                self._check_file()

    async def _probe(self, store: Store) -> None:
        try:
            async with asyncio.timeout(PROBE_PATIENCE_S):
                await self._slots.acquire(store)
                await self._slots.use_in_thread(store, self._probes[store])
        except (SQLAlchemyError, StorageUnavailable, TimeoutError):
            return
        self._failing.discard(store)
        self._is_file_gone = self._is_file_gone and store is not Store.DATABASE
        logger.info("store works again", detail=store)


def write_nothing(engine: Engine) -> None:
    """A write transaction that changes nothing. Raises: SQLAlchemyError."""
    with engine.begin() as connection:
        connection.execute(WRITE)
