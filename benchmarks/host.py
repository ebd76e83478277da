"""What a request costs besides the model: `python -m benchmarks.host --out DIR`.

CPU seconds of the API process and of a worker whose model returns the init image, per request of
one 512² picture: PNG in by URL, PNG out by URL. Beside the totals, each stage that can be called
by itself is timed in this process, with the same functions and a database and folder of its own.
"""

import argparse
import asyncio
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from benchmarks import measure, report
from benchmarks.clients import Call, Ours, drive, save_images, wait_until_ready
from benchmarks.codecs import measure_codecs
from benchmarks.orders import make_orders
from models.imaging.decoding import ImageLimits, decode_image, decode_mask
from models.imaging.images import encode_png
from server.core.settings import Settings
from server.jobs.job import NewJob, RequestFacts
from server.jobs.store import JobStore
from server.sandbox.decoded import DecodedPair
from server.sandbox.wire import TargetSize
from server.storage.database import migrate, open_engine
from server.storage.files import Storage
from tests.support.blocking_decoder import BlockingDecoder
from tests.support.processes import ServerProcess, image_host

API, WORKER = "api", "worker"
SIDE_PX = 512
IDLE_S = 3.0
STAGE_REPEATS = 40
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class HostCase:
    """So many clients in a closed loop."""

    clients: int
    calls: int = 48
    max_rounds: int = 5

    @property
    def work(self) -> float:
        """Requests."""
        return float(self.calls)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU and wall milliseconds per request."""

    api_ms: float
    worker_ms: float
    wall_ms: float

    @property
    def total_ms(self) -> float:
        """CPU of both processes."""
        return self.api_ms + self.worker_ms


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a request that can be called by itself, and the process that does it."""

    process: str
    name: str
    work: Callable[[], object]


class HostBench:
    """API and worker under observation."""

    def __init__(self, target: Ours, api_pid: int, worker_pid: int, images: Path) -> None:
        self._target = target
        self._api, self._worker = psutil.Process(api_pid), psutil.Process(worker_pid)
        self._images = images
        self._seeds = count()

    def run(self, case: HostCase, _side: str, _number: int) -> Cost:
        """A closed loop; what it cost per request."""
        calls = [Call(1, next(self._seeds), SIDE_PX) for _ in range(case.calls)]
        save_images(self._images, calls)
        api_s, worker_s = cpu_s(self._api), cpu_s(self._worker)
        _, elapsed_s = asyncio.run(drive(self._target, calls, case.clients))
        per_call = 1000 / case.calls
        return Cost(
            api_ms=(cpu_s(self._api) - api_s) * per_call,
            worker_ms=(cpu_s(self._worker) - worker_s) * per_call,
            wall_ms=elapsed_s * per_call,
        )

    def idle_percent(self) -> dict[str, float]:
        """Per cent of a core that each process takes while nothing is asked of it."""
        before = cpu_s(self._api), cpu_s(self._worker)
        time.sleep(IDLE_S)
        after = cpu_s(self._api), cpu_s(self._worker)
        return {
            name: 100 * (late - early) / IDLE_S
            for name, early, late in zip((API, WORKER), before, after, strict=True)
        }


def cpu_s(process: Any) -> float:
    """User and system seconds of a process and of all it has started, ended ones included."""
    tree = [process, *process.children(recursive=True)]
    return math.fsum(seconds for each in tree for seconds in each.cpu_times()[:4])


@contextmanager
def running_server(scratch: Path) -> Iterator[HostBench]:
    """The API process as an operator starts it, and the no-op worker on the same data."""
    images, data_dir = scratch / "images", scratch / "data"
    images.mkdir()
    settings = {"INPAINT_HOLD_S": "60", "INPAINT_STEPS_POLICY": "exact"}
    with ExitStack() as stack:
        images_url = stack.enter_context(image_host(images))
        server = ServerProcess(data_dir, settings, "--workers", "0")
        stack.callback(server.stop)
        worker = stack.enter_context(running_worker(data_dir, scratch / "worker.log"))
        wait_until_ready(f"{server.url}/readyz/workers", START_TIMEOUT_S)
        target = Ours(server.url, images_url, data_dir)
        yield HostBench(target, server.pid, worker.pid, images)


@contextmanager
def running_worker(data_dir: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The no-op worker as a process."""
    command = [sys.executable, "-m", "benchmarks.noop_worker", "--data-dir", str(data_dir)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stderr=file, cwd=measure.REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def make_stages(scratch: Path, decoder: BlockingDecoder) -> list[Stage]:
    """In the order of a request. Each leaves behind what the next one needs."""
    (order,) = make_orders(SIDE_PX, [1], seed=1)
    settings = Settings(data_dir=scratch / "stages")
    engine = open_engine(settings.sqlalchemy_url)
    migrate(engine)
    store, storage = JobStore(engine), Storage(settings.storage_url)
    source = order.source()
    files = {"init_image": encode_png(source.init_image), "mask_image": png_of_mask(scratch)}
    pair = decoder.decode_pair(files, TargetSize(SIDE_PX, SIDE_PX))
    png = encode_png(pair.init_image)

    def new_job() -> NewJob:
        params, prefix = order.params(), str(uuid.uuid4())
        return NewJob("v3", RequestFacts(), params, "", prefix, params.work)

    def finish_job() -> None:
        (job,) = store.claim("stages", 1)
        store.heartbeat(job, 1, 1)
        store.finish(job, [None])

    return [
        Stage(API, "decode both PNGs, in a child", lambda: decode_both(files)),
        Stage(API, "hand both to the child", lambda: decoder.decode_pair(files)),
        Stage(API, "store the inputs", lambda: storage.put("inputs/1.npy", pair.to_bytes())),
        Stage(API, "job row: submit", lambda: store.submit(new_job())),
        Stage(API, "job row: look for the end", lambda: store.ended([1])),
        Stage(WORKER, "job row: claim, beat, finish", finish_job),
        Stage(WORKER, "load the inputs", lambda: load_inputs(storage)),
        Stage(WORKER, "encode the PNG", lambda: encode_png(pair.init_image)),
        Stage(WORKER, "store the picture", lambda: storage.put("generations/1.png", png)),
        Stage(API, "read the picture", lambda: storage.get("generations/1.png")),
    ]


def decode_both(files: dict[str, bytes]) -> None:
    """What the decoder's child does, in this process."""
    decode_image(files["init_image"], ImageLimits())
    decode_mask(files["mask_image"], ImageLimits())


def png_of_mask(scratch: Path) -> bytes:
    """A mask as clients send it."""
    (order,) = make_orders(SIDE_PX, [1], seed=1)
    order.mask_image.save(scratch / "mask.png")
    return (scratch / "mask.png").read_bytes()


def load_inputs(storage: Storage) -> DecodedPair:
    """As a worker does it."""
    return DecodedPair.from_bytes(storage.get("inputs/1.npy") or b"")


def stage_ms(stage: Stage) -> float:
    """CPU milliseconds of all threads of this process per call, after a first one."""
    stage.work()
    began = time.process_time()
    for _ in range(STAGE_REPEATS):
        stage.work()
    return 1000 * (time.process_time() - began) / STAGE_REPEATS


def summarise(costs: Sequence[Cost]) -> dict[str, Any]:
    """Medians over rounds, milliseconds per request."""
    names = ("api_ms", "worker_ms", "total_ms", "wall_ms")
    medians = {name: statistics.median(getattr(cost, name) for cost in costs) for name in names}
    return {"rounds": len(costs), **medians}


def split(stages: Sequence[Stage], totals: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages that were timed by themselves, and per process what they leave."""
    rows: list[dict[str, Any]] = [
        {"process": each.process, "stage": each.name, "cpu_ms": stage_ms(each)} for each in stages
    ]
    for process, rest in (
        (API, "rest: HTTP, download, routing, log"),
        (WORKER, "rest: loop, paste"),
    ):
        known = sum(row["cpu_ms"] for row in rows if row["process"] == process)
        left = totals[f"{process}_ms"] - known
        rows.append({"process": process, "stage": rest, "cpu_ms": left})
    return rows


def to_text(findings: dict[str, Any]) -> str:
    """Totals, then their parts."""
    idle = findings["idle_percent"]
    lines = [
        f"# Host: {measure.machine_line(findings['machine'])}",
        "",
        f"CPU milliseconds per request of one {SIDE_PX}² picture, PNG in and out, no-op model;",
        "median of rounds. Wall: of the closed loop, per request.",
        "",
        report.table(
            ["clients", "API", "worker", "both", "wall", "rounds"],
            [
                [clients, row["api_ms"], row["worker_ms"], row["total_ms"], row["wall_ms"]]
                + [row["rounds"]]
                for clients, row in findings["clients"].items()
            ],
        ),
        "Stages called by themselves, and what they leave of the totals above at one client:",
        "",
        report.table(
            ["stage", "process", "CPU ms"],
            [[row["stage"], row["process"], row["cpu_ms"]] for row in findings["stages"]],
        ),
        f"Idle: API {idle[API]:.1f} %, worker {idle[WORKER]:.1f} % of a core.",
        "",
        "PNG codecs alone, milliseconds of one thread, and for how long they kept another from",
        "running:",
        "",
        report.table(
            ["codec", "side, px", "call", "stall"],
            [
                [row["name"], row["side_px"], row["call_ms"], row["stall_ms"]]
                for row in findings["codecs"]
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def to_charts(findings: dict[str, Any]) -> list[report.Chart]:
    """Totals by number of clients, and the stages."""
    totals = {
        f"clients: {clients}": {
            "both": row["total_ms"],
            API: row["api_ms"],
            WORKER: row["worker_ms"],
        }
        for clients, row in findings["clients"].items()
    }
    stages = {row["stage"]: {row["process"]: row["cpu_ms"]} for row in findings["stages"]}
    return [
        report.Chart("CPU ms per request; wanted: both within 30", totals, reference=30.0),
        report.Chart("CPU ms by stage", stages),
    ]


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Drive the server, then time the stages alone."""
    deadline = measure.Deadline(options.budget_s)
    machine = measure.describe_machine()
    cases = [HostCase(clients) for clients in (1, 8)]
    with running_server(scratch) as bench:
        bench.run(HostCase(2, calls=8), "", 0)
        idle = bench.idle_percent()
        results = measure.run_in_turns(cases, ["server"], bench.run, deadline)
    costs = {str(case.clients): results[case]["server"] for case in cases}
    totals = {clients: summarise(each) for clients, each in costs.items() if each}
    with closing(BlockingDecoder(ImageLimits())) as decoder:
        stages = split(make_stages(scratch, decoder), totals["1"])
    return {
        "machine": machine,
        "idle_percent": idle,
        "clients": totals,
        "stages": stages,
        "codecs": [dataclasses.asdict(each) for each in measure_codecs()],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=120, help="wall time, about")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `host.json`, `.md` and `.png`."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-host-") as scratch:
        findings = run(options, Path(scratch))
    report.write_report(options.out, "host", findings, to_text(findings), to_charts(findings))


if __name__ == "__main__":
    main()
