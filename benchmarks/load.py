"""Whether one API process bears the load that is promised: `python -m benchmarks.load --out DIR`.

A real `inpaint-server serve` process with real HTTP over loopback, on SQLite or PostgreSQL. The
load generator runs on the same cores. Only the overhead has a worker, whose model does nothing; all
other jobs are ended by this process through the database.
"""

import argparse
import asyncio
import base64
import dataclasses
import gc
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from PIL import Image
from sqlalchemy import Engine, func, select, update

from benchmarks import measure, report
from benchmarks.clients import wait_until_ready
from benchmarks.disks import (
    MEMORY_FILESYSTEMS,
    filesystem_of,
    fsync_ms,
    is_slowed_down,
    run_again_on_slow_disk,
)
from benchmarks.host import START_TIMEOUT_S, cpu_s, running_worker
from benchmarks.orders import example_image, example_mask, make_prompt
from benchmarks.soak import growth_of, parts_of, resident_kib
from server.core.settings import Settings
from server.jobs.job import JobState
from server.jobs.outbox import queue_delivery
from server.jobs.store import JobStore
from server.serving.server import raise_open_file_limit
from server.storage.database import open_engine, read_only
from server.storage.files import Storage
from server.storage.tables import jobs
from tests.support.processes import ServerProcess

JOBS_PATH, V3_PATH, FETCH_PATH = "/api/jobs", "/api/v3/inpaint", "/api/v3/fetch"
SIDE_PX, OVERHEAD_SIDE_PX = 64, 512
BODIES = 64
"""Different requests that are sent in turn."""

ACCEPTS_PER_S = 100
DRAIN_S = 0.25
"""Seconds between two sweeps that end all waiting jobs."""

FETCH_CLIENTS = 32
FETCHED_JOBS = 200
LIVING, HANGING, REFUSING = 90, 5, 5
"""Webhook receivers: they answer, never answer, refuse connections."""

KILL_AFTER = 100
"""Accepted jobs."""

PATIENCE_S = 120.0
SETTINGS = {
    "INPAINT_HOLD_S": "300",
    "INPAINT_HTTP__KEEP_ALIVE_S": "300",
    "INPAINT_HTTP__MAX_CONNECTIONS_PER_ADDRESS": "5000",
    "INPAINT_QUEUE__MAX_WAITING": "5000",
    "INPAINT_QUEUE__MAX_WAITING_PER_KEY": "5000",
    "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8",
}
"""All clients come from one address and have one key, so they get the limits of many."""

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. accept_s, fetch_s: seconds; the others are counts of calls."""

    accept_s: float = 100.0
    fetch_s: float = 10.0
    waiting: int = 2_000
    webhooks: int = 1_000
    images: int = 100


QUICK = Size(accept_s=10, fetch_s=2, waiting=200, webhooks=200, images=20)


@dataclass(frozen=True, slots=True)
class Target:
    """A promised figure. figure: its key in the findings; is_most: the limit is an upper one."""

    name: str
    figure: str
    limit: float
    is_most: bool = True

    def row(self, figures: Mapping[str, float]) -> list[report.Cell]:
        """Name, target, measured, verdict."""
        value = figures[self.figure]
        is_met = value <= self.limit if self.is_most else value >= self.limit
        sign = "≤" if self.is_most else "≥"
        return [self.name, f"{sign} {self.limit:g}", float(value), "met" if is_met else "short"]


TARGETS = (
    Target("accept at 100/s, p50, ms", "accept_p50_ms", 20),
    Target("accept at 100/s, p99, ms", "accept_p99_ms", 80),
    Target("overhead per image without fetches, p50, ms", "overhead_p50_ms", 40),
    Target("memory of the API with the waiting clients, MB", "waiting_rss_mb", 300),
    Target("fetches per second", "fetches_per_s", 500, is_most=False),
    Target("webhooks per second, 10 % dead receivers", "webhooks_per_s", 50, is_most=False),
    Target("start until ready, without a model, s", "start_p50_s", 3),
    Target("memory growth of the API over the accepted jobs, %", "accept_growth_percent", 5),
    Target("recovery after kill -9, s", "recovery_s", 5),
)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
WEBHOOK_ID = re.compile(rb"\r\nwebhook-id: *(\S+)", re.IGNORECASE)
CUT = (asyncio.IncompleteReadError, ConnectionError)
"""What reading from a connection raises whose other end is gone."""


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of an HTTP/1.1 message."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = CONTENT_LENGTH.search(head)
    return head, await reader.readexactly(int(length[1]) if length else 0)


def encode_post(path: str, values: Mapping[str, Any]) -> bytes:
    """A POST of JSON as it goes over the wire."""
    body = json.dumps(values).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def connect(url: str) -> Connection:
    """A connection that is kept open, for one request at a time.

    httpx2 needs as much processor time for a call as the server: it offered 125 to 400 fetches a
    second from the same two cores, asyncio's streams 550 to 720.
    """
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def send(connection: Connection, request: bytes) -> dict[str, Any]:
    """The answer's JSON. Raises: RuntimeError for a refusal."""
    reader, writer = connection
    writer.write(request)
    head, body = await read_message(reader)
    values: dict[str, Any] = json.loads(body)
    if int(head[9:12]) not in (200, 202) or values.get("status") in ("error", "failed"):
        raise RuntimeError(f"refused: {body[:300].decode()}")
    return values


async def closed_loop(url: str, requests: Iterable[bytes], clients: int = 1) -> list[float]:
    """Clients that each send the next request after an answer; seconds each answer took."""
    pending = iter(requests)
    latencies: list[float] = []

    async def run_client() -> None:
        connection = await connect(url)
        for request in pending:
            began = time.perf_counter()
            await send(connection, request)
            latencies.append(time.perf_counter() - began)
        connection[1].close()

    await asyncio.gather(*(run_client() for _ in range(clients)))
    return latencies


async def open_loop(
    url: str, requests: Iterator[bytes], per_s: float, seconds: float
) -> list[float]:
    """Poisson arrivals, the same for each run, whatever the answers do.

    Seconds from each arrival to its answer.
    """
    idle: list[Connection] = []
    latencies: list[float] = []
    rng = random.Random(1)
    began = time.perf_counter()

    async def send_one(arrived_at: float) -> None:
        connection = idle.pop() if idle else await connect(url)
        await send(connection, next(requests))
        latencies.append(time.perf_counter() - arrived_at)
        idle.append(connection)

    async with asyncio.TaskGroup() as tasks:
        arrives_at = began
        while (arrives_at := arrives_at + rng.expovariate(per_s)) < began + seconds:
            await asyncio.sleep(arrives_at - time.perf_counter())
            tasks.create_task(send_one(arrives_at))
    for _, writer in idle:
        writer.close()
    return latencies


def make_bodies(count: int, side_px: int = SIDE_PX) -> list[dict[str, Any]]:
    """Requests with inline pictures, each another one. They fit both dialects."""
    mask = data_uri(example_mask(side_px))
    return [
        {
            "prompt": make_prompt(index),
            "init_image": data_uri(example_image(side_px, index)),
            "mask_image": mask,
            "seed": index,
        }
        for index in range(count)
    ]


def data_uri(image: Image.Image) -> str:
    """A PNG within a request."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def make_requests(path: str) -> Iterator[bytes]:
    """Without end."""
    return itertools.cycle([encode_post(path, body) for body in make_bodies(BODIES)])


@contextmanager
def running_api(data_dir: Path) -> Iterator[ServerProcess]:
    """A server without workers that is ready."""
    server = ServerProcess(data_dir, SETTINGS, "--workers", "0")
    try:
        wait_until_ready(f"{server.url}/readyz", START_TIMEOUT_S)
        yield server
    finally:
        server.client.close()
        server.stop()


def end_waiting(engine: Engine) -> int:
    """Finish every waiting job in one commit and queue its webhook call; how many there were."""
    now = time.time()
    values = {"state": JobState.FINISHED, "started_at": now - 1, "finished_at": now, "run_s": 1.0}
    change = update(jobs).where(jobs.c.state == JobState.QUEUED).values(values)
    with engine.begin() as connection:
        ended = connection.execute(change.returning(jobs.c.id, jobs.c.key_id, jobs.c.webhook)).all()
        for job_id, key_id, webhook in ended:
            if webhook is not None:
                queue_delivery(connection, job_id, key_id, webhook, now)
    return len(ended)


@asynccontextmanager
async def draining(server: ServerProcess, engine: Engine) -> AsyncIterator[list[int]]:
    """Waiting jobs are ended again and again, as by workers that are never behind.

    Gives the API's memory in KiB after each sweep, a list that grows.
    """
    memory_kib: list[int] = []
    is_over = asyncio.Event()

    async def drain() -> None:
        while not is_over.is_set():
            await asyncio.sleep(DRAIN_S)
            await asyncio.to_thread(end_waiting, engine)
            memory_kib.append(resident_kib(server.pid))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(drain())
        yield memory_kib
        is_over.set()


async def accept(server: ServerProcess, engine: Engine, size: Size) -> Figures:
    """Poisson arrivals of `POST /api/jobs` with two inline pictures, timed from their arrival."""
    requests = make_requests(JOBS_PATH)
    process = psutil.Process(server.pid)
    async with draining(server, engine) as memory_kib:
        await closed_loop(server.url, itertools.islice(requests, 100), 4)  # warms up
        memory_kib.clear()
        cpu_before_s = cpu_s(process)
        latencies = await open_loop(server.url, requests, ACCEPTS_PER_S, size.accept_s)
        cpu_ms = 1000 * (cpu_s(process) - cpu_before_s)
    return {
        "accept_jobs": len(latencies),
        "accept_p50_ms": 1000 * measure.percentile(latencies, 50),
        "accept_p99_ms": 1000 * measure.percentile(latencies, 99),
        "accept_cpu_ms": cpu_ms / len(latencies),
        "accept_growth_percent": 100 * growth_of(parts_of(memory_kib)),
    }


async def fetch(server: ServerProcess, engine: Engine, size: Size) -> Figures:
    """`POST /api/v3/fetch/{id}` of finished jobs by clients in a closed loop."""
    ids = store_pictures(server.data_dir, engine)
    began = time.perf_counter()
    requests = itertools.takewhile(
        lambda _: time.perf_counter() - began < size.fetch_s,
        itertools.cycle([encode_post(f"{FETCH_PATH}/{job_id}", {}) for job_id in ids]),
    )
    latencies = await closed_loop(server.url, requests, FETCH_CLIENTS)
    return {"fetches_per_s": len(latencies) / (time.perf_counter() - began)}


def store_pictures(data_dir: Path, engine: Engine) -> list[int]:
    """What a worker would have stored: a fetch checks that the pictures exist. Ids of the jobs."""
    storage = Storage(Settings(data_dir=data_dir).storage_url)
    query = select(jobs.c.id).where(jobs.c.state == JobState.FINISHED).limit(FETCHED_JOBS)
    with read_only(engine) as connection:
        ids = list(connection.scalars(query))
    for job in map(JobStore(engine).get, ids):
        for key in job.output_keys if job else ():
            storage.put(key, b"a picture")
    return ids


async def wait_together(server: ServerProcess, engine: Engine, size: Size) -> Figures:
    """Held V3 calls, each on a connection of its own; then all their jobs end in one commit."""
    async with asyncio.TaskGroup() as tasks:
        for request in itertools.islice(make_requests(V3_PATH), size.waiting):
            tasks.create_task(closed_loop(server.url, [request]))
            await asyncio.sleep(1 / ACCEPTS_PER_S)
        await until_waiting(engine, size.waiting)
        memory_kib = resident_kib(server.pid)
        await asyncio.to_thread(end_waiting, engine)
        ended_at = time.perf_counter()
    return {
        "waiting_clients": size.waiting,
        "waiting_rss_mb": memory_kib * 1024 / 1e6,
        "waiting_last_answer_s": time.perf_counter() - ended_at,
    }


async def until_waiting(engine: Engine, count: int) -> None:
    """Until so many jobs wait. Raises: TimeoutError."""
    query = select(func.count()).where(jobs.c.state == JobState.QUEUED)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with read_only(engine) as connection:
                if connection.execute(query).scalar_one() >= count:
                    return
            await asyncio.sleep(0.05)


async def call_webhooks(server: ServerProcess, engine: Engine, size: Size) -> Figures:
    """Webhook calls that become due in one commit, to hosts of which 10 % are dead."""
    calls: asyncio.Queue[bytes] = asyncio.Queue()
    arrivals: dict[bytes, float] = {}
    async with receivers(calls) as urls:
        hosts = itertools.islice(itertools.cycle(urls), size.webhooks)
        body = make_bodies(1)[0]
        requests = [encode_post(JOBS_PATH, {**body, "webhook": url}) for url in hosts]
        await closed_loop(server.url, requests, 8)
        await asyncio.to_thread(end_waiting, engine)
        living = size.webhooks * LIVING // len(urls)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while len(arrivals) < living:
                    arrivals.setdefault(await calls.get(), time.perf_counter())
    times = [*arrivals.values()]
    return {
        "webhooks_arrived": len(times),
        "webhooks_per_s": (len(times) - 1) / (times[-1] - times[0]),
    }


@asynccontextmanager
async def receivers(calls: asyncio.Queue[bytes]) -> AsyncIterator[list[str]]:
    """Webhook receivers on loopback addresses of their own; gives their URLs.

    calls: gets the webhook id of each call to a living one.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(*CUT, asyncio.CancelledError):  # cancelled where the benchmark ends first
            while True:
                head, _ = await read_message(reader)
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                calls.put_nowait(WEBHOOK_ID.findall(head)[0])
        writer.close()

    addresses = (f"127.9.0.{number}" for number in itertools.count(1))
    with ExitStack() as stack:
        server = await asyncio.start_server(answer, list(itertools.islice(addresses, LIVING)), 0)
        stack.callback(server.close)
        silent = [stack.enter_context(socket.socket()) for _ in range(HANGING + REFUSING)]
        for each, address in zip(silent, addresses, strict=False):
            each.bind((address, 0))
        # Nobody accepts their connections. Those of the others, which do not listen, are refused.
        for each in silent[:HANGING]:
            each.listen()
        sockets = [*server.sockets, *silent]
        yield ["http://{}:{}/hook".format(*each.getsockname()) for each in sockets]


async def overhead(server: ServerProcess, engine: Engine, size: Size) -> Figures:
    """A held V3 call at a time, 512² pictures inline, and a worker whose model does nothing."""
    with running_worker(server.data_dir, server.data_dir / "worker.log"):
        wait_until_ready(f"{server.url}/readyz/workers", START_TIMEOUT_S)
        bodies = make_bodies(size.images, OVERHEAD_SIDE_PX)
        latencies = await closed_loop(server.url, [encode_post(V3_PATH, each) for each in bodies])
    return {"overhead_p50_ms": 1000 * measure.percentile(latencies, 50)}


async def recover(server: ServerProcess, engine: Engine, _size: Size) -> Figures:
    """SIGKILL while jobs are accepted, a new start, and every accepted job is still there."""
    accepted: list[int] = []
    requests = make_requests(JOBS_PATH)

    async def run_client() -> None:
        connection = await connect(server.url)
        with suppress(*CUT):
            for request in requests:
                accepted.append((await send(connection, request))["id"])
                if len(accepted) == KILL_AFTER:
                    os.kill(server.pid, signal.SIGKILL)
        connection[1].close()

    await asyncio.gather(*(run_client() for _ in range(8)))
    began = time.perf_counter()
    server.kill()
    with running_api(server.data_dir):
        recovery_s = time.perf_counter() - began
    lost = [each for each in accepted if JobStore(engine).get(each) is None]
    if lost:
        raise RuntimeError(f"jobs lost by a kill: {lost}")
    return {"recovery_s": recovery_s}


PARTS = (accept, fetch, wait_together, call_webhooks, overhead, recover)


def measure_all(data_dir: Path, size: Size) -> Figures:
    """Each part on a server of its own, all on the same database."""
    figures: Figures = {}
    starts: list[float] = []
    engine = open_engine(Settings(data_dir=data_dir).sqlalchemy_url)
    for part in PARTS:
        print(f"{part.__name__} …", flush=True)
        began = time.perf_counter()
        with running_api(data_dir) as server:
            starts.append(time.perf_counter() - began)
            figures |= asyncio.run(part(server, engine, size))
    engine.dispose()
    return {**figures, "start_p50_s": measure.percentile(starts, 50)}


def to_text(findings: Mapping[str, Any]) -> str:
    """The promised figures, then the others."""
    figures, machine = findings["figures"], findings["machine"]
    promised = {target.figure for target in TARGETS}
    others: list[list[report.Cell]] = [
        [name.replace("_", " "), value] for name, value in figures.items() if name not in promised
    ]
    lines = [
        f"# Load: {measure.machine_line(machine)}",
        "",
        f"{findings['database']}; data folder on {findings['filesystem']} with an fsync of "
        f"{findings['fsync_ms']:.2f} ms; load average before {machine['load_average_before']}.",
        "",
        report.table(
            ["figure", "target", "measured", "verdict"], [each.row(figures) for each in TARGETS]
        ),
        report.table(["other figure", "measured"], others),
    ]
    return "\n".join(lines)


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure everything. Raises: SystemExit for a folder that is not on a disk."""
    filesystem = filesystem_of(scratch)
    if filesystem in MEMORY_FILESYSTEMS:
        raise SystemExit(f"{scratch} lies on {filesystem}: name a folder on a disk with --scratch")
    machine = measure.describe_machine()
    gc.freeze()  # A collection that walks through all of torch would pause the load generator.
    data_dir = scratch / "data"
    if options.database_url:
        os.environ["INPAINT_DATABASE_URL"] = options.database_url
    size = QUICK if options.quick else Size()
    return {
        "machine": machine,
        "database": "PostgreSQL" if options.database_url else "SQLite",
        "filesystem": filesystem,
        "fsync_ms": fsync_ms(scratch),
        "size": dataclasses.asdict(size),
        "figures": measure_all(data_dir, size),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `load.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument("--fsync-ms", type=float, help="make every fsync so much slower; needs cc")
    parser.add_argument("--database-url", help="an empty PostgreSQL database; default: SQLite")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, for a look")
    options = parser.parse_args(arguments)
    raise_open_file_limit()
    if options.fsync_ms and not is_slowed_down():
        command = ["-m", "benchmarks.load", *(sys.argv[1:] if arguments is None else arguments)]
        raise SystemExit(run_again_on_slow_disk(options.fsync_ms, command))
    with tempfile.TemporaryDirectory(prefix="bench-load-", dir=options.scratch) as scratch:
        findings = run(options, Path(scratch))
    name = "load_postgresql" if options.database_url else "load"
    name += f"_{options.fsync_ms:g}ms" if options.fsync_ms else ""
    report.write_report(options.out, name, findings, to_text(findings))


if __name__ == "__main__":
    main()
