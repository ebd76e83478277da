"""`python -m benchmarks.depth --out DIR`: database calls with few rows and with 100,000.

A PostgreSQL of its own (fsync off, so that the disk does not hide the statements) holds three
databases that differ in their jobs only. Each call is made on all three in turn, so the ratios are
of one run.
"""

import argparse
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, insert, text
from tqdm import tqdm

from benchmarks.measure import describe_machine, machine_line, rotated
from benchmarks.report import Cell, table, write_report
from server.api.monitoring.metrics import StoredFigures
from server.jobs.estimates import Estimator, Forecast
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.storage.database import open_engine
from server.storage.tables import jobs
from tests.support.jobs import PARAMS, new_job
from tests.support.postgres import PostgresServer, find_binaries, running_postgres

FEW, MANY = 1_000, 100_000
"""The default of `queue.max_waiting`, and the depth that it is compared with."""
ROUNDS = 100
SLOW_ROUNDS = 10
BATCH = 5_000
KEYS = 50
WARM_UP = 5


NO_FORECAST = Forecast(0, 0, {}, {}, 0.0)
"""A forecast reads every waiting job, and takes seconds at such a depth: it is not measured."""


@dataclass(frozen=True, slots=True)
class Depth:
    """A database's jobs. name: a column of the table."""

    name: str
    queued: int
    finished: int


DEPTHS = (
    Depth(f"{FEW:,} queued", FEW, FEW),
    Depth(f"{MANY:,} finished", FEW, MANY),
    Depth(f"{MANY:,} queued", MANY, FEW),
)


def rows_of(depth: Depth) -> Iterator[dict[str, object]]:
    """Finished jobs, then waiting ones, of several keys that take turns."""
    for number in range(depth.finished + depth.queued):
        is_finished = number < depth.finished
        ended = {"finished_at": float(number), "run_s": 1.0} if is_finished else {}
        yield {
            "state": JobState.FINISHED if is_finished else JobState.QUEUED,
            "key_id": f"key-{number % KEYS}",
            "dialect": "v3",
            "request": {},
            "params": PARAMS.to_json(),
            "file_prefix": str(uuid.UUID(int=number)),
            "work": 20.0,
            "turn": number // KEYS,
            "created_at": float(number),
            "attempt": int(is_finished),
            "step": 0,
            "total_steps": 0,
            "finished_at": None,
            "run_s": None,
            **ended,
        }


def fill(engine: Engine, depth: Depth) -> None:
    """Write the jobs, and have the planner know them."""
    rows = [*rows_of(depth)]
    with engine.begin() as connection:
        for start in range(0, len(rows), BATCH):
            connection.execute(insert(jobs), rows[start : start + BATCH])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


class Side:
    """The calls on one database, each of which leaves the number of jobs as it was."""

    def __init__(self, engine: Engine) -> None:
        self.store = JobStore(engine, max_waiting=10 * MANY, max_waiting_per_key=10 * MANY)
        estimator = Estimator(lambda _new: NO_FORECAST)
        self.figures = StoredFigures(engine, self.store, estimator, 10 * MANY)

    def claim(self) -> float:
        """Seconds of a claim; its job is queued again."""
        started = time.perf_counter()
        (job,) = self.store.claim("worker", 1)
        took_s = time.perf_counter() - started
        self.store.release(job)
        return took_s

    def submit(self) -> float:
        """Seconds of a submit; its job is cancelled."""
        new = new_job(key_id="key-0", file_prefix=str(uuid.uuid4()))
        started = time.perf_counter()
        job = self.store.submit(new)
        took_s = time.perf_counter() - started
        self.store.cancel(job.id)
        return took_s

    def check_room(self) -> float:
        """Seconds of the counts before a job is accepted."""
        return timed(lambda: self.store.check_room("key-0"))

    def progress(self) -> float:
        """Seconds of the look at one job that clients follow."""
        return timed(lambda: self.store.progress_of([1]))

    def metrics(self) -> float:
        """Seconds of a scrape that counts the tables, without its forecast."""
        return timed(lambda: [*self.figures.collect()])


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


CALLS: dict[str, tuple[Callable[[Side], float], int]] = {
    "claim": (Side.claim, ROUNDS),
    "submit": (Side.submit, ROUNDS),
    "counts before a submit": (Side.check_room, ROUNDS),
    "progress of a followed job": (Side.progress, SLOW_ROUNDS),
    "scrape of /metrics": (Side.metrics, SLOW_ROUNDS),
}
"""By name: the call, and how often it is made."""


@contextmanager
def sides(server: PostgresServer, depths: Sequence[Depth]) -> Iterator[list[Side]]:
    """A filled database for each depth."""
    with ExitStack() as stack:
        found = []
        for depth in tqdm(depths, desc="filling"):
            engine = open_engine(str(server.url(server.create_migrated())))
            stack.callback(engine.dispose)
            fill(engine, depth)
            found.append(Side(engine))
        yield found


def measure(found: Sequence[Side]) -> dict[str, list[float]]:
    """Median milliseconds of each call, by database."""
    medians = {}
    for name, (call, rounds) in tqdm(CALLS.items(), desc="calls"):
        times: dict[int, list[float]] = {index: [] for index in range(len(found))}
        for number in range(WARM_UP + rounds):
            for index in rotated([*times], number):
                took_s = call(found[index])
                if number >= WARM_UP:
                    times[index].append(took_s)
        medians[name] = [1000 * statistics.median(each) for each in times.values()]
    return medians


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    binaries = find_binaries()
    if binaries is None:
        parser.error("PostgreSQL's programs are not installed")
    machine = describe_machine()
    with running_postgres(binaries) as server, sides(server, DEPTHS) as found:
        medians = measure(found)
    names = [depth.name for depth in DEPTHS]
    head = ["median ms of", *names, *(f"÷ {names[0]}: {name}" for name in names[1:])]
    rows: list[list[Cell]] = [
        [call, *values, *(value / values[0] for value in values[1:])]
        for call, values in medians.items()
    ]
    title = f"# Depth of the queue: {machine_line(machine)}\n\nPostgreSQL with fsync off.\n\n"
    findings = {"machine": machine, "databases": names, "median_ms": medians}
    write_report(options.out, "depth", findings, title + table(head, rows))


if __name__ == "__main__":
    main()
