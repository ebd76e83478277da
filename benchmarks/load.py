"""How much an API process bears, on a disk that takes its time: `python -m benchmarks.load`.

A real `inpaint-server serve --workers 0`, of one process or several, HTTP over loopback, SQLite on
a disk folder, or a PostgreSQL of the benchmark's own there. Jobs are ended by this process through
`JobStore`, so that no model is in the way. Each figure stands beside the fsync time measured just
before it, which bounds what can be durable in a second.
"""

import argparse
import asyncio
import base64
import dataclasses
import gc
import io
import itertools
import math
import random
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from sqlalchemy import Engine, func, select, update

from benchmarks import measure, report
from benchmarks.disks import (
    MEMORY_FILESYSTEMS,
    filesystem_of,
    fsync_ms,
    is_slowed_down,
    run_again_on_slow_disk,
)
from benchmarks.orders import example_image, example_mask, make_prompt
from benchmarks.wire import Message, Receivers, Wire, get_bytes, post_bytes
from models.params import InpaintParams
from server.database import deliveries, jobs, migrate, open_engine, read_only
from server.deliveries import DeliveryState
from server.http import raise_open_file_limit
from server.job_store import JobStore
from server.jobs import Job, JobState, NewJob, RequestFacts
from server.settings import Settings
from server.storage import Storage
from tests.postgres import find_binaries, running_postgres
from tests.processes import ServerProcess

SIDE_PX = 64
PICTURES = 64
"""Requests with pictures and prompts of their own, sent in turn."""

STEADY_PER_S = 100
DRAIN_S = 0.25
"""Between two clearings of the queue, which must not reach its limit of 1,000."""

CLIENTS = (32, 8, 1)
STARTS = 3
WAVE = 64
"""Waiting clients that come at a time."""

RECEIVERS = 100
DEAD_SHARE = 0.1
"""Of the receivers, and so of the calls; half of them refuse, half never answer."""

DELIVERED_SHARE = 0.9
"""Of the calls to living receivers, by when the rate is taken."""

MIB = 2**20
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Size:
    """How long and how much; `--quick` takes a tenth."""

    seconds: float = 6.0
    steady_s: float = 20.0
    waiting: int = 5_000
    wake_ups: int = 200
    webhooks: int = 3_000


QUICK = Size(seconds=1.5, steady_s=4.0, waiting=300, wake_ups=20, webhooks=300)


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that was promised. path: where it stands in the findings; unit: for people."""

    name: str
    path: tuple[str, ...]
    unit: str
    limit: float
    is_most: bool

    def value(self, findings: Mapping[str, Any]) -> float:
        """What was measured; NaN where it was left out."""
        found: Any = findings
        for name in self.path:
            found = found.get(name, {})
        return float("nan") if isinstance(found, dict) else float(found)

    def is_met(self, findings: Mapping[str, Any]) -> bool:
        """False for what was left out, too."""
        value = self.value(findings)
        return value <= self.limit if self.is_most else value >= self.limit

    def verdict(self, findings: Mapping[str, Any]) -> str:
        """For people."""
        if math.isnan(self.value(findings)):
            return "not measured"
        return "yes" if self.is_met(findings) else "no"


TARGETS = (
    Target("accept at 100/s, p50", ("steady", "p50_ms"), "ms", 10, True),
    Target("accept at 100/s, p99", ("steady", "p99_ms"), "ms", 50, True),
    Target("accepts over HTTP, 32 clients", ("native, 32", "per_s"), "/s", 1_000, False),
    Target("durable rows, 32 threads", ("rows, 32", "per_s"), "/s", 1_000, False),
    Target("waiting clients", ("waiting", "clients"), "", 5_000, False),
    Target("memory with them", ("waiting", "rss_mib"), "MiB", 250e6 / MIB, True),
    Target("finish to answer, p50", ("wake-up", "p50_ms"), "ms", 25, True),
    Target("webhooks, 10 % dead receivers", ("webhooks", "per_s"), "/s", 50, False),
    Target("fetch, 32 clients", ("V3 fetch", "per_s"), "/s", 2_000, False),
    Target("fetch, 32 clients, p99", ("V3 fetch", "p99_ms"), "ms", 20, True),
    Target("start without a model", ("start", "p50_s"), "s", 3, True),
)


class Cpu:
    """Processor time of the API process and of its picture decoders, since the last look."""

    def __init__(self, pid: int) -> None:
        self._api = psutil.Process(pid)
        self._last = self._read()

    def ms_per(self, count: int) -> dict[str, float]:
        """Milliseconds per piece of work, of `count` pieces."""
        last, self._last = self._last, self._read()
        api_s, decoders_s = (now - then for now, then in zip(self._last, last, strict=True))
        scale = 1000 / max(count, 1)
        return {"api_cpu_ms": api_s * scale, "decoders_cpu_ms": decoders_s * scale}

    def _read(self) -> tuple[float, float]:
        api = self._api.cpu_times()
        decoders = [child.cpu_times() for child in self._api.children()]
        # Decoders are replaced after some thousand pictures: those that have ended count too.
        ended_s = api.children_user + api.children_system
        return api.user + api.system, ended_s + sum(each.user + each.system for each in decoders)


@dataclass(frozen=True, slots=True)
class Site:
    """A server under test and its data."""

    server: ServerProcess
    engine: Engine
    store: JobStore
    started_s: float

    @property
    def url(self) -> str:
        """Of the API."""
        return self.server.url


DatabaseUrl = Callable[[Path], str]
"""The address of a database for a data folder, another one for each."""


def sqlite_url(data_dir: Path) -> str:
    """That of the file in the folder."""
    return Settings(data_dir=data_dir).sqlalchemy_url


@contextmanager
def running_site(data_dir: Path, settings: Mapping[str, str], database_url: str) -> Iterator[Site]:
    """A server without workers, once it answers."""
    began = time.perf_counter()
    own = {**LASTING_CONNECTIONS, "INPAINT_DATABASE_URL": database_url}
    server = ServerProcess(data_dir, {**own, **settings}, *NO_WORKERS)
    with ExitStack() as stack:
        stack.callback(server.client.close)
        stack.callback(server.stop)
        asyncio.run(ask_once(server.url, get_bytes(f"{server.url}/healthz")))
        started_s = time.perf_counter() - began
        engine = open_engine(database_url)
        stack.callback(engine.dispose)
        yield Site(server, engine, JobStore(engine), started_s)


NO_WORKERS = ("--workers", "0")
LASTING_CONNECTIONS = {"INPAINT_HTTP__KEEP_ALIVE_S": "300", "INPAINT_HTTP__HEAD_TIMEOUT_S": "300"}
"""A steady run opens connections ahead, and needs some of them late."""


async def ask_once(url: str, request: bytes) -> Message:
    """One call on a connection of its own."""
    wire = await Wire.open(url)
    try:
        return await wire.ask(request)
    finally:
        wire.close()


def make_bodies(count: int = PICTURES) -> list[dict[str, Any]]:
    """What is asked for: tiny inline pictures, each another one. Fits both dialects."""
    mask = data_uri(example_mask(SIDE_PX))
    return [
        {
            "prompt": make_prompt(index),
            "init_image": data_uri(example_image(SIDE_PX, index)),
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


def post_all(url: str, bodies: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    """Requests made beforehand, round and round."""
    return itertools.cycle([post_bytes(url, body) for body in bodies])


def end_waiting(engine: Engine) -> int:
    """Every waiting job becomes finished, in one commit; how many there were."""
    now = time.time()
    values = {"state": JobState.FINISHED, "started_at": now - 1, "finished_at": now, "run_s": 1.0}
    with engine.begin() as connection:
        change = update(jobs).where(jobs.c.state == JobState.QUEUED).values(values)
        return connection.execute(change).rowcount


@contextmanager
def draining(engine: Engine) -> Iterator[None]:
    """The queue is emptied again and again, as by workers that are never behind."""
    is_over = threading.Event()

    def drain() -> None:
        while not is_over.wait(DRAIN_S):
            end_waiting(engine)

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        end_waiting(engine)


def check(answer: Message, wanted: bytes) -> None:
    """Raises: RuntimeError for another answer than the one that was to come."""
    is_error = answer.status not in (200, 202) or b'"status":"error"' in answer.body
    if is_error or wanted not in answer.body:
        raise RuntimeError(f"not {wanted.decode()}: {answer.body[:300].decode()}")


def timing(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    names = {"p50_ms": 50, "p99_ms": 99, "max_ms": 100}
    return {name: 1000 * measure.percentile(seconds, each) for name, each in names.items()}


async def closed_loop(
    url: str, requests: Iterator[bytes], wanted: bytes, clients: int, seconds: float
) -> dict[str, float]:
    """Clients that each send the next request as soon as they have their answer."""
    latencies: list[float] = []
    wires = [await Wire.open(url) for _ in range(clients)]
    began = time.perf_counter()

    async def run(wire: Wire) -> None:
        while time.perf_counter() - began < seconds:
            sent_at = time.perf_counter()
            answer = await wire.ask(next(requests))
            check(answer, wanted)
            latencies.append(answer.at - sent_at)

    await asyncio.gather(*map(run, wires))
    elapsed_s = time.perf_counter() - began
    for wire in wires:
        wire.close()
    return {"calls": len(latencies), "per_s": len(latencies) / elapsed_s, **timing(latencies)}


def poisson(per_s: float, seconds: float, seed: int) -> list[float]:
    """Times of arrival in seconds, first to last; the same again for the same seed."""
    rng = random.Random(seed)
    gaps = (rng.expovariate(per_s) for _ in itertools.count())
    return list(itertools.takewhile(lambda at: at < seconds, itertools.accumulate(gaps)))


async def open_loop(
    url: str, requests: Iterator[bytes], wanted: bytes, arrivals: Sequence[float]
) -> dict[str, float]:
    """Requests that come when they come; latencies are counted from the time of arrival.

    A thread keeps the time: the event loop's own clock is 0.7 ms late, which would count as ours.
    """
    loop = asyncio.get_running_loop()
    idle: list[Wire] = [await Wire.open(url) for _ in range(16)]
    latencies: list[float] = []
    began = time.perf_counter()

    async def send(arrives_s: float) -> None:
        wire = idle.pop() if idle else await Wire.open(url)
        answer = await wire.ask(next(requests))
        idle.append(wire)
        check(answer, wanted)
        latencies.append(answer.at - began - arrives_s)

    async with asyncio.TaskGroup() as tasks:

        def keep_time() -> None:
            for arrives_s in arrivals:
                time.sleep(max(0.0, began + arrives_s - time.perf_counter()))
                loop.call_soon_threadsafe(lambda at: tasks.create_task(send(at)), arrives_s)

        await asyncio.to_thread(keep_time)
    elapsed_s = time.perf_counter() - began
    for wire in idle:
        wire.close()
    return {"calls": len(latencies), "per_s": len(latencies) / elapsed_s, **timing(latencies)}


class LoadBench:
    """The scenarios, each with folders of its own below `scratch`.

    figures: by name; what a deadline left out is missing.
    """

    def __init__(
        self,
        scratch: Path,
        size: Size,
        deadline: measure.Deadline,
        database_url: DatabaseUrl = sqlite_url,
    ) -> None:
        self._scratch = scratch
        self._database_url = database_url
        self._size = size
        self._deadline = deadline
        self._bodies = make_bodies()
        self._starts: list[float] = []
        self.figures: dict[str, dict[str, float]] = {}
        self.left_out: list[str] = []

    def run(self, only: Sequence[str] = ("",)) -> None:
        """Those whose names begin so, most important first."""
        parts: dict[str, tuple[Callable[[], None], float]] = {
            "accept and fetch": (self.accept, self._size.steady_s + 7 * self._size.seconds + 10),
            "rows": (self.rows, 3 * self._size.seconds + 5),
            "hold": (self.hold, self._size.waiting / 50 + self._size.wake_ups / 5 + 10),
            "webhooks": (self.webhooks, self._size.webhooks / 50 + 10),
            "start": (self.start, 10.0),
        }
        for name, (part, expected_s) in parts.items():
            if not name.startswith(tuple(only)):
                continue
            if self._deadline.left_s < expected_s:
                self.left_out.append(name)
                continue
            print(f"{name} …", flush=True)
            part()
        if self._starts:
            starts = {"p50_s": measure.percentile(self._starts, 50), "max_s": max(self._starts)}
            self._note("start", {"starts": len(self._starts), **starts})

    def accept(self) -> None:
        """Jobs accepted over HTTP: steadily, then as many as it takes; then looked up."""
        limits = {"INPAINT_QUEUE__MAX_WAITING_PER_KEY": "1000", "INPAINT_HOLD_S": "0"}
        with self._site("accept", limits) as site:
            native = post_all(f"{site.url}/api/jobs", self._bodies)
            v3 = post_all(f"{site.url}/api/v3/inpaint", self._bodies)
            wanted = b'"state":"queued"'
            with draining(site.engine):
                asyncio.run(closed_loop(site.url, native, wanted, 4, 1.0))  # warms up
                arrivals = poisson(STEADY_PER_S, self._size.steady_s, seed=1)
                self._count("steady", site, lambda: open_loop(site.url, native, wanted, arrivals))
                for clients in CLIENTS:
                    self._loop(f"native, {clients}", site, native, wanted, clients)
                self._loop("V3, 32", site, v3, b'"status":"', 32)  # may be ended by the draining
            ids = newest_ids(site.engine)
            store_pictures(site, ids)
            fetches = [get_bytes(f"{site.url}/api/jobs/{each}") for each in ids]
            self._loop("native GET", site, itertools.cycle(fetches), b'"finished"', 32)
            fetches = [post_bytes(f"{site.url}/api/v3/fetch/{each}", {}) for each in ids]
            self._loop("V3 fetch", site, itertools.cycle(fetches), b'"success"', 32)

    def rows(self) -> None:
        """The durable row alone: `JobStore.submit` in threads of this process."""
        folder = self._scratch / "rows"
        folder.mkdir()
        engine = open_engine(self._database_url(folder))
        migrate(engine)
        store = JobStore(engine, max_waiting=100_000, max_waiting_per_key=100_000)
        for threads in CLIENTS:
            with draining(engine):
                fsync = fsync_ms(folder)
                figures = submit_for(store, threads, self._size.seconds)
            self._note(f"rows, {threads}", {"fsync_ms": fsync, **figures})
        engine.dispose()

    def hold(self) -> None:
        """Calls that are held until their job ends: one at a time, then thousands."""
        many = str(2 * self._size.waiting)
        settings = {
            "INPAINT_HOLD_S": str(3 * ANSWER_TIMEOUT_S),
            "INPAINT_HTTP__MAX_CONNECTIONS": many,
            "INPAINT_HTTP__MAX_CONNECTIONS_PER_ADDRESS": many,
            "INPAINT_QUEUE__MAX_WAITING": many,
            "INPAINT_QUEUE__MAX_WAITING_PER_KEY": many,
        }
        with self._site("hold", settings) as site:
            requests = post_all(f"{site.url}/api/v3/inpaint", self._bodies)
            count = self._size.wake_ups
            self._count("wake-up", site, lambda: wake_up(site, requests, count))
            self._count("waiting", site, lambda: wait_together(site, requests, self._size.waiting))

    def webhooks(self) -> None:
        """Calls that are all due when the server starts: their jobs have ended before."""
        asyncio.run(self._webhooks())

    async def _webhooks(self) -> None:
        count, dead = self._size.webhooks, round(RECEIVERS * DEAD_SHARE)
        async with Receivers(RECEIVERS - dead, dead // 2, dead - dead // 2) as receivers:
            hosts = [*receivers.living, *receivers.dead]
            urls = [hosts[index % RECEIVERS] for index in range(count)]
            folder = self._scratch / "webhooks"
            folder.mkdir()
            url = self._database_url(folder)
            engine = await asyncio.to_thread(end_jobs_with_webhooks, url, urls)
            fsync = fsync_ms(folder)
            wanted = DELIVERED_SHARE * sum(url in set(receivers.living) for url in urls)
            settings = {"INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8"}
            with ExitStack() as stack:
                starting = running_site(folder, settings, url)
                site = await asyncio.to_thread(stack.enter_context, starting)
                self._starts.append(site.started_s)
                cpu = Cpu(site.server.pid)
                await receivers.wait_for(
                    round(wanted), min(ANSWER_TIMEOUT_S, self._deadline.left_s)
                )
                arrived = sorted(receivers.arrived.values())[: round(wanted)]
                costs = cpu.ms_per(len(receivers.arrived))
                await asyncio.to_thread(stack.close)
            figures = {
                "calls": count,
                "arrived": len(arrived),
                "per_s": rate_of(arrived),
                "repeats": receivers.repeats,
                "noted": delivered_count(engine),
            }
            engine.dispose()
        self._note("webhooks", {"fsync_ms": fsync, **figures, **costs})

    def start(self) -> None:
        """From the command to an answer, without workers, on an empty folder."""
        for number in range(STARTS):
            with self._site(f"start-{number}", {}):
                pass

    @contextmanager
    def _site(self, name: str, settings: Mapping[str, str]) -> Iterator[Site]:
        folder = self._scratch / name
        with running_site(folder, settings, self._database_url(folder)) as site:
            self._starts.append(site.started_s)
            yield site

    def _loop(
        self, name: str, site: Site, requests: Iterator[bytes], wanted: bytes, clients: int
    ) -> None:
        seconds = self._size.seconds
        self._count(name, site, lambda: closed_loop(site.url, requests, wanted, clients, seconds))

    def _count(self, name: str, site: Site, work: Callable[[], Any]) -> None:
        """Do it, and note its figures with what they cost the server."""
        fsync = fsync_ms(site.server.data_dir)
        cpu = Cpu(site.server.pid)
        figures: dict[str, float] = asyncio.run(work())
        self._note(name, {"fsync_ms": fsync, **figures, **cpu.ms_per(int(figures["calls"]))})

    def _note(self, name: str, figures: dict[str, float]) -> None:
        self.figures[name] = figures
        shown = ", ".join(f"{key} {report.show(value)}" for key, value in figures.items())
        print(f"  {name}: {shown}", flush=True)


def store_pictures(site: Site, job_ids: Sequence[int]) -> None:
    """What a worker would have left: a fetch looks whether it is there."""
    storage = Storage(Settings(data_dir=site.server.data_dir).storage_url)
    for job in map(site.store.get, job_ids):
        for key in job.output_keys if job else ():
            storage.put(key, b"a picture")


def newest_ids(engine: Engine, count: int = 200) -> list[int]:
    """Of jobs that have finished."""
    query = select(jobs.c.id).where(jobs.c.state == JobState.FINISHED)
    with read_only(engine) as connection:
        return list(connection.scalars(query.order_by(jobs.c.id.desc()).limit(count)))


def new_job(index: int, webhook: str | None = None) -> NewJob:
    """As the API would make it of a request of `make_bodies`."""
    params = InpaintParams(prompt=make_prompt(index), seed=index, width=SIDE_PX, height=SIDE_PX)
    request = RequestFacts(
        base_url="http://127.0.0.1",
        init_image="(base64, 11000 bytes)",
        mask_image="(base64, 1000 bytes)",
    )
    prefix = str(uuid.uuid4())
    return NewJob("v3", request, params, "load", prefix, params.work, webhook=webhook)


def submit_for(store: JobStore, threads: int, seconds: float) -> dict[str, float]:
    """Each thread submits one job after the other."""
    began = time.perf_counter()
    numbers = itertools.count()

    def submit_on() -> list[float]:
        latencies = []
        while (sent_at := time.perf_counter()) - began < seconds:
            store.submit(new_job(next(numbers)))
            latencies.append(time.perf_counter() - sent_at)
        return latencies

    with ThreadPoolExecutor(threads) as pool:
        results = [pool.submit(submit_on) for _ in range(threads)]
        latencies = [each for result in results for each in result.result()]
    elapsed_s = time.perf_counter() - began
    return {"calls": len(latencies), "per_s": len(latencies) / elapsed_s, **timing(latencies)}


def claim_one(store: JobStore) -> Job:
    """The next job, as soon as there is one. Raises: TimeoutError."""
    until = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < until:
        if claimed := store.claim("load", 1):
            return claimed[0]
        time.sleep(0.005)
    raise TimeoutError("no job came")


def finish_at(store: JobStore, job: Job) -> float:
    """Finish it; when that was durable."""
    store.finish(job, [None])
    return time.perf_counter()


async def wake_up(site: Site, requests: Iterator[bytes], count: int) -> dict[str, float]:
    """One held call at a time: from the job's durable end until its client has the answer."""
    rng = random.Random(2)
    latencies = []
    wire = await Wire.open(site.url)
    for _ in range(count):
        asking = asyncio.ensure_future(wire.ask(next(requests)))
        job = await asyncio.to_thread(claim_one, site.store)
        await asyncio.sleep(rng.uniform(0.02, 0.05))  # anywhere between two looks of the server
        ended_at = await asyncio.to_thread(finish_at, site.store, job)
        answer = await asking
        check(answer, b'"status":"success"')
        latencies.append(answer.at - ended_at)
    wire.close()
    return {"calls": count, **timing(latencies)}


async def wait_together(site: Site, requests: Iterator[bytes], count: int) -> dict[str, float]:
    """So many held calls at a time; then all their jobs end with one commit."""
    process = psutil.Process(site.server.pid)
    before = memory_of(process)
    wires: list[Wire] = []
    asking: list[asyncio.Future[Message]] = []
    while len(asking) < count:
        wave = [await Wire.open(site.url) for _ in range(min(WAVE, count - len(asking)))]
        wires += wave
        asking += [asyncio.ensure_future(wire.ask(next(requests))) for wire in wave]
        await until_waiting(site.engine, asking)
    await asyncio.sleep(1.0)
    held = memory_of(process)
    await asyncio.to_thread(end_waiting, site.engine)
    ended_at = time.perf_counter()
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        answers = await asyncio.gather(*asking)
    for wire, answer in zip(wires, answers, strict=True):
        check(answer, b'"status":"success"')
        wire.close()
    return {
        "calls": count,
        "clients": count,
        "idle_rss_mib": before["rss"],
        "idle_pss_mib": before["pss"],
        "rss_mib": held["rss"],
        "pss_mib": held["pss"],
        "kib_per_client": 1024 * (held["rss"] - before["rss"]) / count,
        "first_answer_ms": 1000 * (min(answer.at for answer in answers) - ended_at),
        "last_answer_ms": 1000 * (max(answer.at for answer in answers) - ended_at),
    }


def memory_of(process: Any) -> dict[str, float]:
    """Resident and proportional MiB of a process, its children not included."""
    memory = process.memory_full_info()
    return {name: getattr(memory, name) / MIB for name in ("rss", "pss")}


async def until_waiting(engine: Engine, asking: Sequence[asyncio.Future[Message]]) -> None:
    """Until the jobs of all calls wait. Raises: TimeoutError; RuntimeError for an early answer."""
    query = select(func.count()).where(jobs.c.state == JobState.QUEUED)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        while True:
            with read_only(engine) as connection:
                if connection.execute(query).scalar_one() >= len(asking):
                    return
            if early := [each for each in asking if each.done()]:
                raise RuntimeError(f"answered before its job has ended: {early[0].result()}")
            await asyncio.sleep(0.02)


def end_jobs_with_webhooks(database_url: str, urls: Sequence[str]) -> Engine:
    """A finished job for each of the URLs, as a worker leaves it: with its call in a row."""
    engine = open_engine(database_url)
    migrate(engine)
    store = JobStore(engine, max_waiting=len(urls), max_waiting_per_key=len(urls))
    made = [new_job(index, url) for index, url in enumerate(urls)]
    with ThreadPoolExecutor(max(CLIENTS)) as pool:
        list(pool.map(store.submit, made))
    for job in store.claim("load", len(urls)):
        store.finish(job, [None])
    return engine


def delivered_count(engine: Engine) -> int:
    """Webhook calls that are noted as received."""
    query = select(func.count()).where(deliveries.c.state == DeliveryState.DELIVERED)
    with read_only(engine) as connection:
        return int(connection.execute(query).scalar_one())


def rate_of(times: Sequence[float]) -> float:
    """Events per second from the first to the last of sorted times; NaN of fewer than two."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")


def to_text(findings: dict[str, Any]) -> str:
    """What was promised, then everything."""
    figures = findings["figures"]
    promised: list[list[report.Cell]] = [
        [
            target.name,
            f"{'at most' if target.is_most else 'at least'} {target.limit:.0f} {target.unit}",
            target.value(figures),
            target.verdict(figures),
        ]
        for target in TARGETS
    ]
    fsyncs = [each["fsync_ms"] for each in figures.values() if "fsync_ms" in each]
    lines = [
        f"# Load: {measure.machine_line(findings['machine'])}",
        "",
        "One API process; no workers, the generator on the same cores; "
        f"{findings['database']} on {findings['filesystem']},",
        f"fsync {min(fsyncs):.2f} to {max(fsyncs):.2f} ms, load average before "
        f"{findings['machine']['load_average_before']}.",
        *(
            [f"Left out for want of time: {', '.join(findings['left_out'])}."]
            * bool(findings["left_out"])
        ),
        "",
        report.table(["figure", "wanted", "measured", "met"], promised),
        *(
            section(title, names, columns, figures)
            for title, names, columns in SECTIONS
            if not figures.keys().isdisjoint(names)
        ),
    ]
    return "\n".join(lines)


TIMES = ("p50_ms", "p99_ms", "max_ms")
CALLS = ("calls", "per_s", *TIMES, "api_cpu_ms", "decoders_cpu_ms", "fsync_ms")
SECTIONS = (
    (
        f"HTTP, accept with two inline pictures of {SIDE_PX}², and looking jobs up with 32 clients",
        ("steady", *(f"native, {clients}" for clients in CLIENTS), "V3, 32")
        + ("native GET", "V3 fetch"),
        CALLS,
    ),
    (
        "The durable row alone",
        tuple(f"rows, {threads}" for threads in CLIENTS),
        CALLS[:5] + CALLS[-1:],
    ),
    ("From a job's end to its client's answer", ("wake-up",), ("calls", *TIMES, "fsync_ms")),
    (
        "Clients that wait together",
        ("waiting",),
        ("clients", "idle_rss_mib", "rss_mib", "pss_mib", "kib_per_client")
        + ("first_answer_ms", "last_answer_ms"),
    ),
    (
        "Webhooks that are due together",
        ("webhooks",),
        ("calls", "arrived", "per_s", "repeats", "noted", "api_cpu_ms", "fsync_ms"),
    ),
    ("Start without a model", ("start",), ("starts", "p50_s", "max_s")),
)


def section(
    title: str, names: Sequence[str], columns: Sequence[str], figures: Mapping[str, Any]
) -> str:
    """A table of those that were measured."""
    rows = [[name, *map(figures[name].get, columns)] for name in names if name in figures]
    return f"{title}:\n\n" + report.table(["", *map(spoken, columns)], rows)


def spoken(column: str) -> str:
    """A figure's name for people: the unit behind a comma."""
    if column == "per_s":
        return "per second"
    name, _, unit = column.rpartition("_")
    units = {"ms": "ms", "s": "s", "mib": "MiB"}
    words = name.replace("_", " ").replace("cpu", "CPU").replace("api", "API").replace("rss", "RSS")
    return f"{words}, {units[unit]}" if unit in units else column.replace("_", " ")


def to_charts(findings: dict[str, Any]) -> list[report.Chart]:
    """Rates, and times of accepting."""
    figures = findings["figures"]
    rated = {name: each for name, each in figures.items() if "per_s" in each and name != "steady"}
    timed = {name: each for name, each in figures.items() if "p99_ms" in each}
    return [
        report.Chart(
            "Per second", {name: {"per s": each["per_s"]} for name, each in rated.items()}
        ),
        report.Chart(
            "Milliseconds",
            {name: {"p50": each["p50_ms"], "p99": each["p99_ms"]} for name, each in timed.items()},
        ),
    ]


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All scenarios. Raises: SystemExit for a folder that is no disk."""
    filesystem = filesystem_of(scratch)
    if filesystem in MEMORY_FILESYSTEMS:
        raise SystemExit(f"{scratch} lies on {filesystem}: name a folder on a disk with --scratch")
    machine = measure.describe_machine()
    # That loaded torch. Rounds of this process's garbage collector through all of it would take the
    # server's time.
    gc.collect()
    gc.freeze()
    size = QUICK if options.quick else Size()
    deadline = measure.Deadline(options.budget_s)
    databases = postgresql_urls(options.scratch) if options.postgresql else nullcontext(sqlite_url)
    with databases as database_url:
        bench = LoadBench(scratch, size, deadline, database_url)
        bench.run(options.only)
    return {
        "machine": machine,
        "database": "PostgreSQL" if options.postgresql else "SQLite",
        "filesystem": filesystem,
        "size": dataclasses.asdict(size),
        "left_out": bench.left_out,
        "figures": bench.figures,
        "met": {target.name: target.is_met(bench.figures) for target in TARGETS},
    }


@contextmanager
def postgresql_urls(parent: Path | None) -> Iterator[DatabaseUrl]:
    """Databases of a server that waits for the disk. Raises: SystemExit where there is none."""
    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("no PostgreSQL is installed")
    with running_postgres(binaries, parent, is_durable=True) as server:
        yield lambda _data_dir: str(server.url(server.create_database()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument("--fsync-ms", type=float, help="make the disk so much slower; needs cc")
    parser.add_argument("--postgresql", action="store_true", help="start one; not SQLite")
    parser.add_argument(
        "--only", type=measure.words, default=("",), help="parts whose names begin so"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--budget-s", type=float, default=420, help="wall time, about")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `load.json`, `.md` and `.png`."""
    options = parse(arguments)
    raise_open_file_limit()
    if options.fsync_ms and not is_slowed_down():
        command = ["-m", "benchmarks.load", *(sys.argv[1:] if arguments is None else arguments)]
        raise SystemExit(run_again_on_slow_disk(options.fsync_ms, command))
    with tempfile.TemporaryDirectory(prefix="bench-load-", dir=options.scratch) as scratch:
        findings = run(options, Path(scratch))
    name = "load_postgresql" if options.postgresql else "load"
    name += f"_{options.fsync_ms:g}ms" if options.fsync_ms else ""
    report.write_report(options.out, name, findings, to_text(findings), to_charts(findings))


if __name__ == "__main__":
    main()
