"""`python -m benchmarks.simulate --workers 10,100,1000`: what a fleet would do, and what it needs.

Arrivals, pictures, the measured speed of a device and a number of workers in; latencies, queue,
writes, connections and the store's bytes out. Nothing is contended but the workers: database,
store and API processes are counted, not simulated. `--check FLEET.json` compares it with a run of
`benchmarks.fleet`.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import percentile
from benchmarks.report import Cell, table
from server.core.settings import IN_FLIGHT_ON_CPU, IN_FLIGHT_ON_GPU, Settings

RESULTS = Path(__file__).parent / "results"
REFERENCE_STEPS, REFERENCE_PX = 20, 512**2
"""Of a picture whose work is 1."""

HEARTBEATS_PER_S = 2.0
"""Of a worker that holds jobs: `worker.loop.HEARTBEAT_S`, whose module would import torch."""

REPORTS_PER_S = 0.2
"""Of every worker: `worker.loop.REPORT_S`."""

POLLS_PER_S = 100.0
"""Of an idle worker: `worker.loop.IDLE_POLL_S`."""

REFRESHES_PER_S = 1.0
"""Claims that every worker tries without a notification: `notify.REFRESH_S`."""

WORKER_CONNECTIONS = 5
DATABASE_CONNECTIONS: int = Settings.model_fields["database_connections"].default
"""Of a worker, and of an API process."""

INPUT_BYTES_PER_PX = 4.0
"""`DecodedPair.to_bytes`: RGB and the mask, without compression."""

PNG_BYTES_PER_PX = 2.0
"""Of a photograph. RGB without compression is 3."""

API_UTILIZATION = 0.5
"""Of a core, so that arrivals in bursts find it free."""


@dataclass(frozen=True, slots=True)
class Speed:
    """A device. pictures_per_s: by jobs in flight, ascending, pictures of work 1 in all."""

    pictures_per_s: tuple[tuple[int, float], ...]
    places: int = IN_FLIGHT_ON_GPU

    def at(self, in_flight: int) -> float:
        """Interpolated; beyond the last measurement it stays."""
        counts, speeds = zip(*self.pictures_per_s, strict=True)
        return float(np.interp(in_flight, counts, speeds))

    @classmethod
    def measured(cls, name: str) -> "Speed":
        """Our side of a report of `benchmarks.serving` with one number of steps."""
        found = json.loads((RESULTS / f"{name}.json").read_text())
        work = work_of(found["side_px"], statistics.fmean(found["steps"]))
        speeds = {
            int(scenario.split()[0]): each["servers"]["ours"]["pictures_per_s"] * work
            for scenario, each in found["scenarios"].items()
            if scenario.endswith(" clients")
        }
        return cls(tuple(sorted(speeds.items())))


@dataclass(frozen=True, slots=True)
class Kind:
    """Pictures of one sort, and their share of all."""

    side_px: int
    steps: int
    share: float = 1.0

    @property
    def work(self) -> float:
        return work_of(self.side_px, self.steps)


def work_of(side_px: float, steps: float) -> float:
    """In pictures of 512² and 20 steps."""
    return side_px**2 * steps / (REFERENCE_PX * REFERENCE_STEPS)


@dataclass(frozen=True, slots=True)
class Load:
    """per_s: pictures. burst: mean size of the groups that arrive together, 1 for Poisson."""

    per_s: float
    seconds: float
    mix: tuple[Kind, ...] = (Kind(512, 20),)
    burst: float = 1.0
    seed: int = 1

    @property
    def mean_work(self) -> float:
        return mean_of(self.mix, [kind.work for kind in self.mix])

    @property
    def mean_px(self) -> float:
        return mean_of(self.mix, [kind.side_px**2 for kind in self.mix])

    def arrivals(self) -> Iterator[tuple[float, float]]:
        """Moment and work of each picture. Groups come at random, their sizes are geometric."""
        chance = random.Random(self.seed)
        shares = [kind.share for kind in self.mix]
        now = chance.expovariate(self.per_s / self.burst)
        while now < self.seconds:
            yield now, chance.choices(self.mix, shares)[0].work
            if chance.random() < 1 / self.burst:
                now += chance.expovariate(self.per_s / self.burst)


def mean_of(mix: Sequence[Kind], values: Sequence[float]) -> float:
    return float(np.average(values, weights=[kind.share for kind in mix]))


@dataclass(slots=True)
class Worker:
    """A device that is shared by its jobs in equal parts.

    done: work that each job which is held all the time would have got. ends: of which value each
    job ends, with the moment of its arrival.
    """

    done: float = 0.0
    since: float = 0.0
    ends: list[tuple[float, float]] = field(default_factory=list)
    version: int = 0


class Simulation:
    """The queue's rules: first come, first served, and claims up to a worker's share of all jobs.

    Of the workers below their share the one that holds least claims, because an idle worker polls
    more often than one that waits for its device. With equal workers somebody always is below it
    or all are full, so that no job waits for `FAIR_SHARE_S`. Turns of keys are left out: they
    change whose jobs wait, and not how many. overhead_s: from submit to end without any work.
    """

    def __init__(self, workers: int, speed: Speed, overhead_s: float = 0.0) -> None:
        self._speed = speed
        self._overhead_s = overhead_s
        self._workers = [Worker() for _ in range(workers)]
        self._by_held = [dict.fromkeys(range(workers)), *({} for _ in range(speed.places))]
        self._waiting: deque[tuple[float, float]] = deque()
        self._live = 0
        self._now = 0.0
        self._events: list[tuple[float, int, int]] = []
        self.ended: list[tuple[float, float]] = []
        """Arrival and end of each job."""
        self.queue_lengths: list[int] = []
        """As each job finds it."""
        self.claims = 0
        self.woken = 0
        """Workers with a free place, summed over the jobs whose NOTIFY wakes them."""
        self.busy_s = 0.0
        """Of all workers, in which they held jobs."""

    def run(self, arrivals: Iterator[tuple[float, float]]) -> None:
        """Until all jobs have ended."""
        coming = next(arrivals, None)
        while coming or self._events:
            if coming and (not self._events or coming[0] <= self._events[0][0]):
                self._now = coming[0]
                self.queue_lengths.append(len(self._waiting))
                self.woken += len(self._workers) - len(self._by_held[-1])
                self._waiting.append(coming)
                self._live += 1
                coming = next(arrivals, None)
                if coming and coming[0] == self._now:
                    continue  # The others of the burst first.
            else:
                self._now, number, version = heapq.heappop(self._events)
                if not self._end_next(number, version):
                    continue
            self._claim()

    def _end_next(self, number: int, version: int) -> bool:
        """End a worker's next job; False where its jobs have changed since that was planned."""
        worker = self._workers[number]
        if worker.version != version:
            return False
        held = len(worker.ends)
        self._go_on(worker)
        _, arrived_at = heapq.heappop(worker.ends)
        self.ended.append((arrived_at, self._now + self._overhead_s))
        self._live -= 1
        self._changed(number, held)
        return True

    def _claim(self) -> None:
        while self._waiting:
            share = math.ceil(self._live / len(self._workers))
            limit = min(share, self._speed.places)
            below = (next(iter(numbers)) for numbers in self._by_held[:limit] if numbers)
            number = next(below, None)
            if number is None:
                return
            worker = self._workers[number]
            held = len(worker.ends)
            self._go_on(worker)
            for _ in range(min(limit - held, len(self._waiting))):
                arrived_at, work = self._waiting.popleft()
                heapq.heappush(worker.ends, (worker.done + work, arrived_at))
            self.claims += 1
            self._changed(number, held)

    def _go_on(self, worker: Worker) -> None:
        """Bring a worker up to now."""
        held, passed_s = len(worker.ends), self._now - worker.since
        if held:
            worker.done += passed_s * self._speed.at(held) / held
            self.busy_s += passed_s
        worker.since = self._now

    def _changed(self, number: int, held_before: int) -> None:
        """Plan a worker's next end anew."""
        worker = self._workers[number]
        held = len(worker.ends)
        del self._by_held[held_before][number]
        self._by_held[held][number] = None
        worker.version += 1
        if held:
            left = (worker.ends[0][0] - worker.done) * held / self._speed.at(held)
            heapq.heappush(self._events, (self._now + max(0.0, left), number, worker.version))


@dataclass(frozen=True, slots=True)
class Costs:
    """What the simulation cannot know of the host. All are measured on one machine.

    overhead_s: from submit to end of a job without steps. api_cpu_s: of an API process per picture.
    """

    overhead_s: float
    api_cpu_s: float

    @classmethod
    def measured(cls) -> "Costs":
        """Of the latest reports."""
        fleet = json.loads((RESULTS / "fleet.json").read_text())
        host = json.loads((RESULTS / "host.json").read_text())
        return cls(fleet["figures"]["overhead_p50_s"], host["clients"]["8"]["api_ms"] / 1000)


def database_load(simulation: Simulation, workers: int, seconds: float) -> dict[str, float]:
    """What a run asks of the database, per second.

    writes: commits that write: one to submit a job, one for a claim, one to finish a job;
    heartbeats while a worker holds jobs; reports. notified: submits and ends, which send a NOTIFY.
    claims_tried: each submit wakes all workers with a free place, and most find nothing.
    Webhooks, removals and what clients ask of the API are not in it.
    """
    jobs_per_s = len(simulation.ended) / seconds
    claims_per_s = simulation.claims / seconds
    beats_per_s = HEARTBEATS_PER_S * simulation.busy_s / seconds
    notified = 2 * jobs_per_s
    woken = min(simulation.woken / seconds, POLLS_PER_S * workers)
    return {
        "writes_per_s": notified + claims_per_s + beats_per_s + REPORTS_PER_S * workers,
        "notified_per_s": notified,
        "claims_tried_per_s": woken + claims_per_s + jobs_per_s + REFRESHES_PER_S * workers,
    }


def foretell(workers: int, load: Load, speed: Speed, costs: Costs) -> dict[str, float]:
    """What this load does to a fleet. The first fifth of the time fills the empty fleet."""
    simulation = Simulation(workers, speed, costs.overhead_s)
    simulation.run(load.arrivals())
    warm_s = load.seconds / 5
    latencies = [end - began for began, end in simulation.ended if began >= warm_s]
    api = max(2, math.ceil(load.per_s * costs.api_cpu_s / API_UTILIZATION))
    bytes_per_picture = load.mean_px * (INPUT_BYTES_PER_PX + PNG_BYTES_PER_PX)
    return {
        "workers": workers,
        "pictures_per_s": load.per_s,
        "p50_s": percentile(latencies, 50),
        "p95_s": percentile(latencies, 95),
        "p99_s": percentile(latencies, 99),
        "queue_p95": percentile(simulation.queue_lengths, 95),
        **database_load(simulation, workers, load.seconds),
        "api_processes": api,
        "connections": api * DATABASE_CONNECTIONS + workers * WORKER_CONNECTIONS,
        "store_out_mb_per_s": load.per_s * bytes_per_picture / 1e6,
    }


def workers_needed(load: Load, speed: Speed, costs: Costs, p95_s: float) -> int:
    """The fewest workers whose p95 is no longer. Raises: ValueError where no number suffices."""
    best = speed.at(speed.places)
    workers = max(1, math.floor(load.per_s * load.mean_work / best))
    for _ in range(200):
        found = foretell(workers, load, speed, costs)
        if found["p95_s"] <= p95_s:
            return workers
        workers += math.ceil(workers / 50)
    raise ValueError(f"no number of workers gives a p95 of {p95_s:g} s")


def check(measured: dict[str, Any]) -> list[list[Cell]]:
    """A run of `benchmarks.fleet` beside its simulation, which knows of it what one worker did.

    That is the throughput of one worker and the overhead of a job without steps. Arrivals are those
    of the run.
    """
    by_workers = measured["by_workers"]
    speed = Speed(((1, by_workers["1"]["full"]["pictures_per_s"]),), places=IN_FLIGHT_ON_CPU)
    overhead_s = measured["figures"]["overhead_p50_s"]
    rows: list[list[Cell]] = []
    for workers, each in by_workers.items():
        pairs = [
            *pairs_of_full_queue(each["full"], int(workers), speed),
            *pairs_of_open_loop(each["open"], int(workers), speed, overhead_s),
        ]
        cells: list[Cell] = [workers]
        for pair in pairs:
            cells += [*pair, error(*pair)]
        rows.append(cells)
    return rows


def pairs_of_full_queue(
    measured: dict[str, float], workers: int, speed: Speed
) -> list[tuple[float, float]]:
    """Pictures and writes a second, measured and simulated."""
    simulation = Simulation(workers, speed)
    simulation.run((0.0, 1.0) for _ in range(10 * speed.places * workers))
    seconds = max(end for _, end in simulation.ended)
    pictures = len(simulation.ended) / seconds
    # Nothing is submitted while this is measured, so there is a write less per picture.
    writes = database_load(simulation, workers, seconds)["writes_per_s"] - pictures
    return [(measured["pictures_per_s"], pictures), (measured["writes_per_s"], writes)]


def pairs_of_open_loop(
    measured: dict[str, Any], workers: int, speed: Speed, overhead_s: float
) -> list[tuple[float, float]]:
    """p50, p95 and transactions a second, simulated with the arrivals of the measured run."""
    simulation = Simulation(workers, speed, overhead_s)
    arrivals_s = measured["arrivals_s"]
    simulation.run((arrival_s, 1.0) for arrival_s in arrivals_s)
    latencies = [end - began for began, end in simulation.ended]
    load = database_load(simulation, workers, arrivals_s[-1])
    # The pool pings each connection that it lends, which is a transaction too.
    transactions = 2 * (load["writes_per_s"] + load["claims_tried_per_s"])
    return [
        *((measured[f"p{each}_s"], percentile(latencies, each)) for each in (50, 95)),
        (measured["transactions_per_s"], transactions),
    ]


CHECK_HEAD = ["workers"]
for measured_figure in ("pictures/s", "writes/s", "p50, s", "p95, s", "transactions/s"):
    CHECK_HEAD += [measured_figure, "simulated", "error"]


def error(measured: float, simulated: float) -> str:
    """Of the simulation, in per cent of what was measured."""
    return f"{100 * (simulated / measured - 1):+.0f} %"


def parse_speed(words: str) -> Speed:
    """`NAME` of a report in `results/`, or `1:4.1,8:6.7`. Raises: ValueError."""
    if ":" not in words:
        return Speed.measured(words)
    pairs = (each.split(":") for each in words.split(","))
    return Speed(tuple(sorted((int(count), float(per_s)) for count, per_s in pairs)))


def parse_mix(words: str) -> tuple[Kind, ...]:
    """`512x20:0.7,1024x30:0.3`: side in pixels, steps, share. Raises: ValueError."""
    kinds = []
    for each in words.split(","):
        kind, _, share = each.partition(":")
        side_px, steps = kind.split("x")
        kinds.append(Kind(int(side_px), int(steps), float(share or 1)))
    return tuple(kinds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=parse_numbers, default="10,100,1000", help="with commas")
    parser.add_argument("--speed", type=parse_speed, default="serving_h100")
    parser.add_argument("--mix", type=parse_mix, default="512x20")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--per-s", type=float, help="pictures that arrive")
    rate.add_argument("--load", type=float, default=0.7, help="the same, as a share of capacity")
    parser.add_argument("--burst", type=float, default=1.0, help="that arrive together, mean")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--p95-s", type=float, help="how many workers keep this, for --per-s")
    parser.add_argument("--check", type=Path, help="a report of benchmarks.fleet")
    options = parser.parse_args(arguments)
    if options.p95_s and not options.per_s:
        parser.error("--p95-s needs --per-s")
    return options


def parse_numbers(words: str) -> list[int]:
    return [int(each) for each in words.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    options = parse(arguments)
    if options.check:
        print(table(CHECK_HEAD, check(json.loads(options.check.read_text()))))
        return
    costs = Costs.measured()
    load = Load(options.per_s or 1.0, options.seconds, options.mix, options.burst)
    numbers = options.workers
    if options.p95_s:
        numbers = [workers_needed(load, options.speed, costs, options.p95_s)]
    rows = []
    for workers in numbers:
        capacity = workers * options.speed.at(options.speed.places) / load.mean_work
        per_s = options.per_s or options.load * capacity
        rows.append(foretell(workers, replace(load, per_s=per_s), options.speed, costs))
    print(table([*rows[0]], [[str(row.pop("workers")), *row.values()] for row in rows]))


if __name__ == "__main__":
    main()
