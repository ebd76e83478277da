"""`WorkerRegistry`: the last status report of each worker, and which workers are alive.

A worker is alive while its reports arrive. A `HeartbeatMonitor` measures that by the steady clock
of the reading process, because wall clocks of machines differ and jump. A worker that cannot use
its model or device reports `failed` once and ends. Operators see that report until the next run of
the worker, although the worker is not alive.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Column, Connection, Engine, select, tuple_
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from server.jobs.leases import HeartbeatMonitor
from server.storage.database import read_only
from server.storage.tables import worker_figures, workers

ALIVE_S = 30.0
"""A worker that has not reported for so long counts as dead."""

ROW_KEPT_S = 600.0
"""The row of a worker that has not reported for so long is removed."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's last report. state: loading, ready or failed."""

    id: str
    device: str
    model: str
    state: str
    detail: str
    seen_at: float

    @property
    def host(self) -> str:
        """The name of its machine, with which an id begins unless the operator has chosen it."""
        return self.id.rpartition("-")[0]

    @property
    def name(self) -> str:
        """What distinguishes it from other workers of its machine."""
        return self.id.rpartition("-")[2]


class WorkerRegistry:
    """All access to the rows of workers. Synchronous; safe for several threads and processes.

    clock: seconds since the epoch. steady_clock: monotonic seconds.
    """

    def __init__(
        self, engine: Engine, clock: Callable[[], float], steady_clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._monitor = HeartbeatMonitor[str](steady_clock)

    def report(self, status: WorkerStatus, figures: str | None = None) -> None:
        """Write a worker's status in place of its earlier one.

        figures: its metrics in Prometheus' text format, in place of the earlier ones; None leaves
            these as they are.
        """
        values = {each.name: getattr(status, each.name) for each in fields(status)}
        with self._engine.begin() as connection:
            _write(connection, workers.c.id, values)
            if figures is not None:
                counted = {"worker_id": status.id, "figures": figures}
                _write(connection, worker_figures.c.worker_id, counted)

    def remove(self, worker_id: str) -> None:
        """Remove the row of a worker that has ended."""
        with self._engine.begin() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker_id))

    def get(self, worker_id: str) -> WorkerStatus | None:
        """A worker's last report, however old; None before its first."""
        query = select(workers).where(workers.c.id == worker_id)
        with read_only(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else WorkerStatus(**row._mapping)

    def figures_of(self, worker_ids: Collection[str]) -> dict[str, str]:
        """The last figures of each of these workers that has reported some."""
        query = select(worker_figures).where(worker_figures.c.worker_id.in_(worker_ids))
        with read_only(self._engine) as connection:
            return {row.worker_id: row.figures for row in connection.execute(query)}

    def alive(self) -> list[WorkerStatus]:
        """The last reports of the workers that are alive."""
        with read_only(self._engine) as connection:
            return self._alive_in(connection)

    def seen(self) -> list[WorkerStatus]:
        """The last reports that operators see: of workers that are alive, and of failed ones."""
        with read_only(self._engine) as connection:
            reports = self._reports_in(connection)
        return [each for each, is_alive in reports if is_alive or each.state == "failed"]

    def ready_in(self, connection: Connection) -> list[WorkerStatus]:
        """The living workers that claim jobs, read in the caller's transaction."""
        return [each for each in self._alive_in(connection) if each.state == "ready"]

    def remove_dead(self) -> int:
        """Remove the rows of workers that died long ago; how many there were."""
        with read_only(self._engine) as connection:
            reports = connection.execute(select(workers.c.id, workers.c.seen_at)).all()
        silent_s = self._silent_s({row.id: row.seen_at for row in reports})
        dead = [tuple(row) for row in reports if silent_s[row.id] > ROW_KEPT_S]
        if not dead:
            return 0
        is_dead = tuple_(workers.c.id, workers.c.seen_at).in_(dead)
        with self._engine.begin() as connection:
            return connection.execute(workers.delete().where(is_dead)).rowcount

    def _alive_in(self, connection: Connection) -> list[WorkerStatus]:
        return [each for each, is_alive in self._reports_in(connection) if is_alive]

    def _reports_in(self, connection: Connection) -> list[tuple[WorkerStatus, bool]]:
        """The last report of each worker, and whether the worker is alive."""
        rows = connection.execute(select(workers)).all()
        silent_s = self._silent_s({row.id: row.seen_at for row in rows})
        return [(WorkerStatus(**row._mapping), silent_s[row.id] < ALIVE_S) for row in rows]

    def _silent_s(self, reports: Mapping[str, float]) -> dict[str, float]:
        """Seconds since each worker's last report. reports: `seen_at` by id, of all workers."""

        def initial_s(seen_at: float) -> float:
            # The first check has only the wall clock to compare with. If that clock is wrong, a
            # living worker counts as dead until its next report, some seconds later.
            return min(abs(self._clock() - seen_at), ALIVE_S)

        return self._monitor.silent_s(reports, initial_s)


def _write(connection: Connection, key: Column[str], values: Mapping[str, Any]) -> None:
    """Write a row in place of the one that has the same key."""
    insert = sqlite_insert if connection.dialect.name == "sqlite" else postgresql_insert
    upsert = insert(key.table).values(values)
    connection.execute(upsert.on_conflict_do_update(index_elements=[key], set_=values))
