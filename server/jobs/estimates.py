"""When jobs will end: a forecast of the whole queue, played forward as the workers make it.

A worker makes several jobs side by side, a denoising step of each in turn, so that jobs which share
batches end together. How fast that goes is measured at the last finished jobs: how many ran beside
each, and how much all of them got done per second. Estimates err on the long side, because a client
that is told too little asks in vain.
"""

import heapq
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, case, select

from server.jobs.fair_queue import ORDER
from server.jobs.job import JobState
from server.storage.tables import jobs

MARGIN = 1.2
"""Of all estimates, for jobs that arrive later."""

GRAIN_S = 0.3
"""Added to all estimates: claims, stores and looks between a job's denoising and its end."""

EXTRA_STEPS = 3.0
"""What encoding, decoding and storing cost besides denoising, in steps."""

GUESSED_SPEED = 1_000_000.0
"""Pixel steps per second of a worker nothing is known of: about 5 s for 20 steps at 512×512."""

SLOW_FACTOR = 5.0
"""A recent job that took longer than this many times the median counts as if it took no longer:
one that waited for its model or for a store must not multiply every estimate."""

ALONE_FACTOR = 0.6
"""Throughput of fewer jobs side by side than were ever measured, as a part of what more jobs had: a
GPU is filled by a batch, not by one picture."""

ALIKE = 1.5
"""Numbers of jobs side by side count as alike within this factor."""

LATELY_S = 120.0
"""How long the number of jobs side by side says how many there will be."""

START_S = 30.0
"""Until somebody works, where nobody does: a guess at the start of a worker. A client told less
would ask again and again for nothing."""

MAX_TOLD = 10_000
"""Jobs whose first estimate is remembered."""

USUALLY = 0.7
"""Part of the recent jobs that had no more beside them than is taken for usual."""

FRESH_S = 0.2
"""How long a forecast counts for the jobs it knows."""

COST_FACTOR = 10.0
"""A forecast counts for so many times as long as it took to make: with a thousand jobs in the queue
it may take a tenth of one core."""

RECENT_JOBS = 20
"""How many of the last finished jobs tell the speed."""

SIDES = [jobs.c.params[name].as_integer() for name in ("samples", "width", "height")]
PIXELS = SIDES[0] * SIDES[1] * SIDES[2]
"""Of a job, in each of its steps."""

RECENT = (
    select(PIXELS.label("pixels"), jobs.c.work, jobs.c.finished_at, jobs.c.run_s)
    .where(jobs.c.state == JobState.FINISHED, jobs.c.run_s > 0, jobs.c.work > 0)
    .order_by(jobs.c.id.desc())
    .limit(RECENT_JOBS)
)
LEFT = jobs.c.work * (
    1 - 1.0 * jobs.c.step / case((jobs.c.total_steps == 0, 1), else_=jobs.c.total_steps)
)
IN_ORDER = (
    select(jobs.c.id, jobs.c.state, PIXELS.label("pixels"), LEFT.label("left"))
    .where(jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING]))
    .order_by((jobs.c.state == JobState.RUNNING).desc(), *ORDER)
)


@dataclass(frozen=True, slots=True)
class LiveWork:
    """A job that waits or runs. pixels: of all its samples, in each step. steps: left to do."""

    id: int
    is_running: bool
    pixels: float
    steps: float


@dataclass(frozen=True, slots=True)
class DoneWork:
    """A finished job. ended_at: seconds since the epoch. run_s: from claim to end."""

    pixels: float
    steps: float
    ended_at: float
    run_s: float

    @property
    def work(self) -> float:
        """Pixel steps, with what a job costs besides."""
        return self.pixels * (self.steps + EXTRA_STEPS)


@dataclass(frozen=True, slots=True)
class Throughput:
    """What all workers together get done.

    measured: for each recent job how many ran side by side, on average, and the pixel steps per
    second of all of them. usual_jobs: side by side lately. usual_pixels: per step of those beside
    one. 0 after a rest.
    """

    guess: float
    measured: tuple[tuple[float, float], ...] = ()
    usual_jobs: float = 0.0
    usual_pixels: float = 0.0

    def at(self, count: float) -> float:
        """Pixel steps per second with so many jobs side by side."""
        if not self.measured:
            return self.guess
        alike = [speed for jobs, speed in self.measured if 1 / ALIKE <= jobs / count <= ALIKE]
        if alike:
            return statistics.median(alike)
        fewer = [each for each in self.measured if each[0] < count]
        if fewer:
            return max(fewer)[1]
        return min(self.measured)[1] * ALONE_FACTOR


@dataclass(frozen=True, slots=True)
class Forecast:
    """The queue at a moment, and what will become of it.

    ends_s: of each job, seconds until it ends. positions: of those that wait, 1 is next. wait_s:
    until a job that came now would start.
    """

    waiting: int
    running: int
    ends_s: Mapping[int, float]
    positions: Mapping[int, int]
    wait_s: float

    def position(self, job_id: int) -> int:
        """Of a job that waits; 1 is next. One that is not known comes last."""
        unknown = 1 if job_id in self.ends_s else self.waiting + 1
        return self.positions.get(job_id, unknown)

    def eta_s(self, job_id: int) -> float:
        """Seconds until a job probably ends; of one that is not known as if it came last."""
        last_s = max(self.ends_s.values(), default=self.wait_s)
        return round(GRAIN_S + MARGIN * self.ends_s.get(job_id, last_s), 1)


def measure(done: Sequence[DoneWork], workers: int, now: float) -> Throughput:
    """Throughput by the last finished jobs. workers: ready ones, for a guess where there are none.

    now: seconds since the epoch.
    """
    guess = GUESSED_SPEED * max(workers, 1)
    known = [each for each in done if each.run_s > 0 and each.work > 0]
    if not known:
        return Throughput(guess)
    usual = statistics.median(each.run_s / each.work for each in known)
    # The ends only place the jobs beside each other. Each is as long as its worker measured, so
    # that a jump of the wall clock between two ends is one more pause, which does not count.
    spans = [
        (each.ended_at - run_s, each.ended_at, each)
        for each in known
        for run_s in [min(each.run_s, SLOW_FACTOR * usual * each.work)]
    ]
    measured, beside = [], []
    for start, end, each in spans:
        shares = [
            (max(0.0, min(end, until) - max(start, since)), until - since, other)
            for since, until, other in spans
        ]
        count = sum(overlap for overlap, _, _ in shares) / (end - start)
        speed = sum(other.work * overlap / whole for overlap, whole, other in shares)
        measured.append((count, speed / (end - start)))
        together = sum(other.pixels * overlap for overlap, _, other in shares) / (end - start)
        beside.append(together - each.pixels)
    lately = [index for index, each in enumerate(known) if abs(now - each.ended_at) <= LATELY_S]
    if not lately:
        return Throughput(guess, tuple(measured))
    return Throughput(
        guess,
        tuple(measured),
        usually(measured[index][0] for index in lately),
        usually(beside[index] for index in lately),
    )


def usually(values: Iterable[float]) -> float:
    """More than most of the values, as an estimate should be."""
    ordered = sorted(values)
    return ordered[int(len(ordered) * USUALLY)]


def play(live: Sequence[LiveWork], places: int, throughput: Throughput, pause_s: float) -> Forecast:
    """Let the workers go on until all jobs have ended.

    live: running jobs first, then the waiting ones in their order. places: jobs that run side by
    side, of all workers. pause_s: until anybody works. Jobs that end are taken to be followed by
    others, as many as there have been lately.
    """
    waiting = [each for each in live if not each.is_running]
    behind = iter(waiting)
    beside = [
        (each.steps + EXTRA_STEPS / 2, each.id, each.pixels) for each in live if each.is_running
    ]
    heapq.heapify(beside)
    pixels = sum(each[2] for each in beside)
    done, at_s, wait_s = 0.0, pause_s, None
    ends_s: dict[int, float] = {}
    while True:
        while len(beside) < places and (each := next(behind, None)) is not None:
            heapq.heappush(beside, (done + each.steps + EXTRA_STEPS, each.id, each.pixels))
            pixels += each.pixels
        if wait_s is None and len(beside) < places:
            wait_s = at_s
        if not beside:
            break
        # All advance by as many steps as the first one has left.
        count, last = len(beside), heapq.heappop(beside)
        speed = throughput.at(max(count, throughput.usual_jobs))
        at_s += (last[0] - done) * max(pixels, throughput.usual_pixels + pixels / count) / speed
        done = last[0]
        pixels -= last[2]
        ends_s[last[1]] = at_s
    return Forecast(
        len(waiting),
        len(live) - len(waiting),
        ends_s,
        {each.id: position for position, each in enumerate(waiting, 1)},
        at_s if wait_s is None else wait_s,
    )


def read_forecast(
    connection: Connection, devices: Sequence[str], places_on: Callable[[str], int], now: float
) -> Forecast:
    """The queue in the database, played forward.

    devices: those of the workers that are ready. places_on: jobs side by side in a worker, by its
    device. now: seconds since the epoch.
    """
    done = [
        DoneWork(row.pixels, row.work / row.pixels, row.finished_at, row.run_s)
        for row in connection.execute(RECENT)
    ]
    left = [
        LiveWork(row.id, row.state == JobState.RUNNING, row.pixels, row.left / row.pixels)
        for row in connection.execute(IN_ORDER)
    ]
    places = sum(map(places_on, devices)) or places_on("")
    pause_s = 0.0 if devices else START_S
    return play(left, places, measure(done, len(devices), now), pause_s=pause_s)


@dataclass(slots=True)
class Estimator:
    """The latest forecast, shared by all that ask. Synchronous; safe for several threads.

    look: makes a forecast. clock: monotonic seconds.
    """

    look: Callable[[], Forecast]
    clock: Callable[[], float] = time.monotonic
    _latest: tuple[Forecast, float, float] | None = field(default=None, init=False)

    def forecast(self, job_id: int | None = None) -> Forecast:
        """The queue as it is; where looking takes long, as it was a while ago.

        job_id: of a job that was there a moment ago, for which that moment's forecast does.
        Raises: sqlalchemy.exc.SQLAlchemyError.
        """
        now = self.clock()
        if self._latest is not None:
            latest, made_at, took_s = self._latest
            is_known = job_id in latest.ends_s
            kept_s = COST_FACTOR * took_s
            if now - made_at < (max(kept_s, FRESH_S) if is_known else kept_s):
                return latest
        made = self.look()
        self._latest = made, now, self.clock() - now
        return made


class ToldEstimates:
    """What clients were first told of their jobs, to be held against the truth. Of one event loop.

    clock: seconds since the epoch, as the times of rows.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._told: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def note(self, job_id: int, eta_s: float) -> float:
        """The estimate, which is remembered if it is the job's first."""
        self._told.setdefault(job_id, (self._clock(), eta_s))
        if len(self._told) > MAX_TOLD:
            self._told.popitem(last=False)
        return eta_s

    def pop_ratio(self, job_id: int, ended_at: float) -> float | None:
        """The first estimate over the true seconds; None where it was told after the end."""
        told_at, eta_s = self._told.pop(job_id, (ended_at, 0.0))
        return eta_s / (ended_at - told_at) if ended_at > told_at else None
