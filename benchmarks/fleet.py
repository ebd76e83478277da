"""`python -m benchmarks.fleet --out DIR`: 1, 2, 4 and 8 workers on one PostgreSQL and one S3.

Real worker processes, each with an engine that waits a second per picture and computes nothing
(`scripted_worker.py`), and one API process. The benchmark submits jobs through `JobStore`. What it
reports of them is read from their rows, so polls of the benchmark do not count.
"""

import argparse
import os
import random
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Row, case, func, select, text
from tqdm import tqdm

from benchmarks.measure import describe_machine, machine_line, percentile
from benchmarks.report import Cell, table, write_report
from models.params import InpaintParams
from server.jobs.job import JobState, NewJob, RequestFacts
from server.jobs.store import IS_LIVE, JobStore
from server.sandbox.decoded import DecodedPair
from server.storage.database import open_engine, read_only
from server.storage.files import Storage
from server.storage.tables import jobs
from tests.chaos.scripts import Script
from tests.support.postgres import PostgresServer, find_binaries, running_postgres
from tests.support.processes import Process, ServerProcess
from tests.support.s3 import S3Server, locate_rclone, running_s3
from tests.support.waiting import until

STEPS = 20
SIDE_PX = 64
"""Small, because the host's work on two cores is not what is measured."""

LOAD = 0.7
"""Arrivals per second of the open loop, as a share of what the workers can make."""

KEYS = 10
PATIENCE_S = 240.0
TRANSACTIONS = text(
    "SELECT xact_commit + xact_rollback, xact_commit,"
    " pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
    " FROM pg_stat_database WHERE datname = current_database()"
)
"""Commits and rollbacks, commits, and how many transactions have written. The pool pings each
connection that it lends, which PostgreSQL counts as a commit too."""

IS_MAKING = (jobs.c.state == JobState.RUNNING) & (jobs.c.total_steps > 0)
PROGRESS = select(
    func.sum(
        case(
            (jobs.c.state == JobState.FINISHED, 1.0),
            (IS_MAKING, 1.0 * jobs.c.step / jobs.c.total_steps),
            else_=0.0,
        )
    ),
    func.avg(jobs.c.heartbeat_at).filter(IS_MAKING),
)
"""Pictures made so far, and when: progress is as old as the heartbeat that told of it. Parts of
pictures count, because a worker's jobs end in groups."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. workers: ascending. The others are seconds or counts."""

    workers: tuple[int, ...] = (1, 2, 4, 8)
    picture_s: float = 1.0
    arrivals_s: float = 25.0
    settle_s: float = 4.0
    window_s: float = 20.0
    idle_s: float = 15.0
    bursts: int = 5
    wakes: int = 40


@dataclass(frozen=True, slots=True)
class Target:
    """A promised figure of the largest fleet. is_most: the limit is an upper one."""

    name: str
    figure: str
    limit: float
    is_most: bool = True

    def row(self, figures: dict[str, float]) -> list[Cell]:
        """Name, target, measured, verdict."""
        value = float(figures[self.figure])
        is_met = value <= self.limit if self.is_most else value >= self.limit
        return [
            self.name,
            f"{'≤' if self.is_most else '≥'} {self.limit:g}",
            value,
            "met" if is_met else "short",
        ]


TARGETS = (
    Target("pictures/s ÷ workers, with a full queue", "efficiency", 0.95, is_most=False),
    Target(
        "workers without a job of a burst while another has more than its share", "burst_idle", 0
    ),
    Target("commits/s of the idle workers and the API", "idle_commits_per_s", 40),
    Target("from submit to claim while idle, p50, ms", "wake_p50_ms", 20),
)


class Fleet:
    """Workers that are started one by one, and the stores they share with this process."""

    def __init__(self, postgres: PostgresServer, s3: S3Server, room: Path) -> None:
        database = str(postgres.url(postgres.create_migrated()))
        self.engine = open_engine(database)
        self.store = JobStore(self.engine, max_waiting=10_000, max_waiting_per_key=10_000)
        options = {key: value for key, value in s3.environment.items() if key.startswith("AWS_")}
        self.storage = Storage(s3.environment["INPAINT_STORAGE__URL"], options)
        self._room = room
        self.environment = {
            **s3.environment,
            "INPAINT_DATABASE_URL": database,
            "INPAINT_DATABASE_CONNECTIONS": "8",
            # Reads of a fault's marks, which no script here asks for.
            "CHAOS_FOLDER": str(room),
        }
        self.workers: list[Process] = []
        self._numbers = iter(range(1_000_000))

    def grow(self, count: int) -> None:
        """Start workers until there are so many, all ready."""
        while len(self.workers) < count:
            name = f"gpu-{len(self.workers)}"
            flags = ["--worker-id", name, "--device", "cpu", "--data-dir", str(self._room / name)]
            program = "benchmarks.scripted_worker"
            self.workers.append(Process(self.environment, *flags, program=program))
        until(
            lambda: all(worker.events("worker ready") for worker in self.workers),
            PATIENCE_S,
            "all workers are ready",
        )

    def prepare(self, picture_s: float) -> NewJob:
        """A job whose input is stored, to be submitted."""
        number = next(self._numbers)
        prompt = str(Script(tag=str(number), step_s=picture_s / STEPS))
        params = InpaintParams(
            prompt=prompt, seed=number, width=SIDE_PX, height=SIDE_PX, num_inference_steps=STEPS
        )
        new = NewJob(
            dialect="v3",
            request=RequestFacts(),
            params=params,
            key_id=f"key-{number % KEYS}",
            file_prefix=str(uuid.uuid4()),
            work=params.work,
        )
        picture = np.full((SIDE_PX, SIDE_PX, 3), number % 256, np.uint8)
        mask = np.full((SIDE_PX, SIDE_PX), 255, np.uint8)
        self.storage.put(new.input_key, DecodedPair(picture, mask).to_bytes())
        return new

    def submit(self, prepared: Sequence[NewJob]) -> list[int]:
        """At once; their ids."""
        return [self.store.submit(new).id for new in prepared]

    def live(self) -> int:
        """How many jobs wait or run."""
        return int(self._scalar(select(func.count()).where(IS_LIVE)))

    def made(self) -> tuple[float, float]:
        """Pictures so far, and the moment they were counted at; of a fleet that works."""
        with read_only(self.engine) as connection:
            pictures, moment = connection.execute(PROGRESS).one()
        return float(pictures), float(moment)

    def transactions(self) -> tuple[int, int, int]:
        """All transactions, those that were committed, and those that wrote, so far."""
        with read_only(self.engine) as connection:
            ended, commits, writes = connection.execute(TRANSACTIONS).one()
        return ended, commits, writes

    def rows(self, ids: Sequence[int]) -> list[Row[Any]]:
        """The jobs, as they are in the table."""
        with read_only(self.engine) as connection:
            return [*connection.execute(select(jobs).where(jobs.c.id.in_(ids)).order_by(jobs.c.id))]

    def ended(self, ids: Sequence[int]) -> list[Row[Any]]:
        """The rows, once all of them have finished."""
        until(lambda: not self.live(), PATIENCE_S, "all jobs have ended")
        rows = self.rows(ids)
        assert all(row.state == JobState.FINISHED for row in rows), "a job did not finish"
        return rows

    def claims(self, ids: Sequence[int]) -> Counter[int]:
        """How many of these jobs each worker has claimed, by its number; from the workers' logs."""
        wanted = {*ids}
        return Counter(
            number
            for number, worker in enumerate(self.workers)
            for line in worker.events("job claimed")
            if line["job_id"] in wanted
        )

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.stop()
        self.engine.dispose()

    def _scalar(self, query: Any) -> Any:
        with read_only(self.engine) as connection:
            return connection.scalar(query)


def open_loop(fleet: Fleet, size: Size) -> dict[str, Any]:
    """Poisson arrivals at `LOAD`, and the latency from submit to end of each."""
    chance = random.Random(len(fleet.workers))
    per_s = LOAD * len(fleet.workers) / size.picture_s
    prepared = [fleet.prepare(size.picture_s) for _ in range(round(per_s * size.arrivals_s))]
    ids: list[int] = []
    before = fleet.transactions()
    began = due_at = time.monotonic()
    for new in prepared:
        due_at += chance.expovariate(per_s)
        time.sleep(max(0.0, due_at - time.monotonic()))
        ids += fleet.submit([new])
    found = rates(before, fleet.transactions(), time.monotonic() - began)
    rows = fleet.ended(ids)
    latencies = [row.finished_at - row.created_at for row in rows]
    return {
        "arrivals_s": [row.created_at - rows[0].created_at for row in rows],
        "latencies_s": latencies,
        "p50_s": percentile(latencies, 50),
        "p95_s": percentile(latencies, 95),
        **found,
    }


def full_queue(fleet: Fleet, size: Size) -> dict[str, float]:
    """Pictures and commits per second while more jobs wait than can be made."""
    workers = len(fleet.workers)
    places = 8 * workers
    enough = round(1.3 * workers * (size.window_s + size.settle_s) / size.picture_s) + places
    ids = fleet.submit([fleet.prepare(size.picture_s) for _ in range(enough)])
    time.sleep(size.settle_s)
    began, (made, began_at), before = time.monotonic(), fleet.made(), fleet.transactions()
    time.sleep(size.window_s)
    took_s, after = time.monotonic() - began, fleet.transactions()
    pictures, ended_at = fleet.made()
    per_s = (pictures - made) / (ended_at - began_at)
    for job in ids:
        fleet.store.cancel(job)
    until(lambda: not fleet.live(), PATIENCE_S, "the queue is empty")
    return {
        "pictures_per_s": per_s,
        "efficiency": per_s * size.picture_s / workers,
        **rates(before, after, took_s),
    }


def rates(
    before: tuple[int, int, int], after: tuple[int, int, int], took_s: float
) -> dict[str, float]:
    """Of transactions between two looks."""
    names = ("transactions_per_s", "commits_per_s", "writes_per_s")
    changes = zip(names, before, after, strict=True)
    return {name: (late - early) / took_s for name, early, late in changes}


def idle(fleet: Fleet, size: Size) -> dict[str, float]:
    """What the database does for a fleet without work."""
    time.sleep(2.0)  # PostgreSQL's sessions report what they have done about once a second.
    began, before = time.monotonic(), fleet.transactions()
    time.sleep(size.idle_s)
    found = rates(before, fleet.transactions(), time.monotonic() - began)
    return {f"idle_{name}": value for name, value in found.items()}


def share_bursts(fleet: Fleet, size: Size) -> dict[str, float]:
    """Two jobs for each worker, submitted at once to an idle fleet: who claimed them, and when."""
    workers = len(fleet.workers)
    share = 2
    most, idle_workers, waits = [], [], []
    for _ in range(size.bursts):
        rows = fleet.ended(
            fleet.submit([fleet.prepare(size.picture_s) for _ in range(share * workers)])
        )
        held = fleet.claims([row.id for row in rows])
        most.append(max(held.values()) / share)
        idle_workers.append(workers - len(held) if most[-1] > 1 else 0)
        waits += [row.started_at - row.created_at for row in rows]
    return {
        "burst_most": max(most),
        "burst_idle": float(max(idle_workers)),
        "burst_claimed_p95_s": percentile(waits, 95),
    }


def wake(fleet: Fleet, size: Size) -> dict[str, float]:
    """One job after the other without steps that take time: until its claim, and until its end.

    By the wall clock, which all processes of a machine share. `queued_s` of a row compares two
    estimates of the database's clock, which differ by milliseconds.
    """
    chance = random.Random(1)
    rows: list[Row[Any]] = []
    for _ in range(size.wakes):
        new = fleet.prepare(0.0)
        time.sleep(chance.uniform(0.05, 0.15))
        rows += fleet.ended(fleet.submit([new]))
    waits = [1000 * (row.started_at - row.created_at) for row in rows]
    overheads = [row.finished_at - row.created_at for row in rows]
    return {
        "wake_p50_ms": percentile(waits, 50),
        "wake_p95_ms": percentile(waits, 95),
        "overhead_p50_s": percentile(overheads, 50),
    }


def measure(fleet: Fleet, size: Size) -> dict[str, Any]:
    """By number of workers, then what only the whole fleet is asked for."""
    by_workers = {}
    for workers in tqdm(size.workers, desc="workers"):
        fleet.grow(workers)
        fleet.ended(fleet.submit([fleet.prepare(0.0) for _ in range(2 * workers)]))  # warm-up
        by_workers[workers] = {"full": full_queue(fleet, size), "open": open_loop(fleet, size)}
    figures = {"efficiency": by_workers[size.workers[-1]]["full"]["efficiency"]}
    for part in (idle, share_bursts, wake):
        figures |= part(fleet, size)
    return {"picture_s": size.picture_s, "by_workers": by_workers, "figures": figures}


@contextmanager
def running_fleet(postgres: PostgresServer, room: Path) -> Iterator[Fleet]:
    """An S3 server, an API process and no worker yet; all ended at the end."""
    with ExitStack() as stack:
        s3 = stack.enter_context(running_s3(room / "s3"))
        fleet = Fleet(postgres, s3, room)
        stack.callback(fleet.close)
        api = ServerProcess(room / "api", fleet.environment, "--workers", "0")
        stack.callback(api.stop)
        stack.callback(api.client.close)
        yield fleet


def to_text(findings: dict[str, Any]) -> str:
    """Targets, then figures by number of workers."""
    machine, figures = findings["machine"], findings["figures"]
    rows: list[Sequence[Cell]] = [
        [
            str(workers),
            each["full"]["efficiency"],
            each["full"]["pictures_per_s"],
            each["full"]["commits_per_s"],
            each["full"]["writes_per_s"],
            each["open"]["p50_s"],
            each["open"]["p95_s"],
            each["open"]["transactions_per_s"],
        ]
        for workers, each in findings["by_workers"].items()
    ]
    head = [
        "workers",
        "efficiency",
        "pictures/s",
        "commits/s",
        "writing",
        "p50, s",
        "p95, s",
        "transactions/s",
    ]
    others = [[name, value] for name, value in figures.items()]
    return "\n".join(
        [
            f"# Fleet: {machine_line(machine)}",
            "",
            f"PostgreSQL with fsync off, S3 by rclone, pictures of {findings['picture_s']:g} s; "
            f"load average before {machine['load_average_before']}, after "
            f"{findings['load_average_after']}.",
            "",
            table(
                ["figure of the largest fleet", "target", "measured", "verdict"],
                [target.row(figures) for target in TARGETS],
            ),
            f"With a full queue, and from the column p50 on with arrivals at {LOAD:g} of it:",
            "",
            table(head, rows),
            table(["other figure", "measured"], others),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    binaries = find_binaries()
    if binaries is None or locate_rclone() is None:
        parser.error("PostgreSQL's programs and rclone must be installed")
    findings: dict[str, Any] = {"machine": describe_machine()}
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        postgres = stack.enter_context(running_postgres(binaries))
        findings |= measure(stack.enter_context(running_fleet(postgres, room)), Size())
    findings["load_average_after"] = round(os.getloadavg()[0], 2)
    write_report(options.out, "fleet", findings, to_text(findings))


if __name__ == "__main__":
    main()
