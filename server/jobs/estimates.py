"""When jobs will end: a simulation of the backlog at the measured throughput.

A worker runs several jobs concurrently, a denoising step of each in turn, so that jobs which share
batches end together. Throughput is measured from the last finished jobs: how many ran at the same
time as each, and how much work all of them did per second. Estimates err on the long side, because
a client polls in vain when its estimate is too short.
"""

import heapq
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, Row, case, select

from server.core.errors import DeadlineUnmeetable
from server.jobs.fair_queue import ORDER
from server.jobs.job import JobState, NewJob
from server.storage.tables import jobs

MARGIN = 1.2
"""Factor on all estimates, for jobs that arrive later."""

OVERHEAD_S = 0.3
"""Added to all estimates, for claims, writes and polls before and after a job's denoising."""

EXTRA_STEPS = 3.0
"""The cost of encoding, decoding and storing, in denoising steps."""

GUESSED_SPEED = 1_000_000.0
"""Pixel steps per second of an unmeasured worker: about 5 s for 20 steps at 512×512."""

SLOW_FACTOR = 5.0
"""A finished job counts at most this many times the median time, because one that waited for its
model or for a store must not multiply every estimate."""

ALONE_FACTOR = 0.6
"""Throughput of fewer concurrent jobs than were measured, as a share of the throughput of more: one
picture does not fill a GPU as a batch does."""

SIMILAR_FACTOR = 1.5
"""Measurements at concurrencies within this factor count as measured at the same one."""

RECENT_S = 120.0
"""Jobs that ended within this time predict how many will run concurrently."""

START_S = 30.0
"""A guess at the time until a worker is ready, when there is none."""

MAX_QUOTED = 10_000
"""Jobs whose first estimate is kept."""

USUAL_QUANTILE = 0.7
"""The quantile of recent concurrency that predicts the coming one."""

CACHED_S = 0.2
"""How long a forecast is reused for jobs that it contains."""

COST_FACTOR = 10.0
"""A forecast is reused for this many times the time it took, so that forecasts of a long queue take
at most a tenth of one core."""

RECENT_JOBS = 20
"""How many finished jobs the throughput is measured from."""

SIDES = [jobs.c.params[name].as_integer() for name in ("samples", "width", "height")]
PIXELS = SIDES[0] * SIDES[1] * SIDES[2]
"""A job's pixels per step, over all its samples."""

RECENTLY_FINISHED = (
    select(PIXELS.label("pixels"), jobs.c.work, jobs.c.finished_at, jobs.c.run_s)
    .where(jobs.c.state == JobState.FINISHED, jobs.c.run_s > 0, jobs.c.work > 0)
    .order_by(jobs.c.id.desc())
    .limit(RECENT_JOBS)
)
REMAINING_WORK = jobs.c.work * (
    1 - 1.0 * jobs.c.step / case((jobs.c.total_steps == 0, 1), else_=jobs.c.total_steps)
)
BACKLOG = (
    select(
        jobs.c.id,
        jobs.c.state,
        PIXELS.label("pixels"),
        REMAINING_WORK.label("remaining"),
        jobs.c.priority,
        jobs.c.turn,
    )
    .where(jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING]))
    .order_by((jobs.c.state == JobState.RUNNING).desc(), *ORDER)
)


@dataclass(frozen=True, slots=True)
class PendingWork:
    """A waiting or running job. pixels: per step, of all samples. steps: still to do."""

    id: int
    is_running: bool
    pixels: float
    steps: float


CANDIDATE_ID = 0
"""Id of a job in a forecast that is not submitted yet. Ids of rows begin at 1."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that may be submitted.

    pixels, work: as `BACKLOG` reads them from rows. priority, turn: its place in the queue.
    """

    pixels: int
    work: float
    priority: int
    turn: int


@dataclass(frozen=True, slots=True)
class FinishedWork:
    """A finished job. ended_at: seconds since the epoch. run_s: from claim to end."""

    pixels: float
    steps: float
    ended_at: float
    run_s: float

    @property
    def work(self) -> float:
        """Pixel steps, including `EXTRA_STEPS`."""
        return self.pixels * (self.steps + EXTRA_STEPS)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Throughput of all workers together, by concurrency.

    guess: pixel steps per second, for use without measurements.
    measured: for each finished job the average number of concurrent jobs, and their pixel steps per
        second.
    usual_jobs: concurrent jobs recently. usual_pixels: pixels per step of the jobs that ran beside
        one. Both are 0 when no job ended recently.
    """

    guess: float
    measured: tuple[tuple[float, float], ...] = ()
    usual_jobs: float = 0.0
    usual_pixels: float = 0.0

    def at(self, count: float) -> float:
        """Pixel steps per second with so many concurrent jobs."""
        if not self.measured:
            return self.guess
        similar = [
            speed
            for jobs, speed in self.measured
            if 1 / SIMILAR_FACTOR <= jobs / count <= SIMILAR_FACTOR
        ]
        if similar:
            return statistics.median(similar)
        fewer = [each for each in self.measured if each[0] < count]
        if fewer:
            return max(fewer)[1]
        return min(self.measured)[1] * ALONE_FACTOR


@dataclass(frozen=True, slots=True)
class Forecast:
    """The simulated end of every job in the backlog.

    ends_s: seconds until each job ends. positions: of waiting jobs; 1 is next. wait_s: seconds
    until a job submitted now would start. is_measured: workers are ready, and finished jobs show
    their throughput; otherwise the forecast is a guess.
    """

    waiting: int
    running: int
    ends_s: Mapping[int, float]
    positions: Mapping[int, int]
    wait_s: float
    is_measured: bool = False

    def position(self, job_id: int) -> int:
        """Position of a waiting job; 1 is next. An unknown job comes last."""
        unknown = 1 if job_id in self.ends_s else self.waiting + 1
        return self.positions.get(job_id, unknown)

    def eta_s(self, job_id: int) -> float:
        """Estimated seconds until a job ends. An unknown job counts as the last one."""
        last_s = max(self.ends_s.values(), default=self.wait_s)
        return round(OVERHEAD_S + MARGIN * self.ends_s.get(job_id, last_s), 1)


def measure_throughput(done: Sequence[FinishedWork], workers: int, now: float) -> Throughput:
    """Throughput from finished jobs. workers: how many are ready, for the guess.

    now: seconds since the epoch.
    """
    guess = GUESSED_SPEED * max(workers, 1)
    known = [each for each in done if each.run_s > 0 and each.work > 0]
    if not known:
        return Throughput(guess)
    usual = statistics.median(each.run_s / each.work for each in known)
    # Only the ends come from the wall clock. Durations come from the workers' steady clocks, so a
    # jump of the wall clock only adds a pause between two jobs, and pauses do not count.
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
    recent = [index for index, each in enumerate(known) if abs(now - each.ended_at) <= RECENT_S]
    if not recent:
        return Throughput(guess, tuple(measured))
    return Throughput(
        guess,
        tuple(measured),
        usual_value(measured[index][0] for index in recent),
        usual_value(beside[index] for index in recent),
    )


def usual_value(values: Iterable[float]) -> float:
    """The `USUAL_QUANTILE`, above the median because estimates err on the long side."""
    ordered = sorted(values)
    return ordered[int(len(ordered) * USUAL_QUANTILE)]


def simulate(
    live: Sequence[PendingWork], places: int, throughput: Throughput, pause_s: float
) -> Forecast:
    """Simulate the workers until all jobs have ended.

    live: running jobs first, then waiting jobs in queue order. places: jobs that all workers run at
    a time. pause_s: until the first worker is ready. New jobs are assumed to replace jobs that end,
    so that concurrency stays as it was recently.
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
        # All running jobs advance by the steps that the shortest one has left.
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
    connection: Connection,
    devices: Sequence[str],
    places_on: Callable[[str], int],
    now: float,
    candidate: Candidate | None = None,
) -> Forecast:
    """Simulate the backlog in the database.

    devices: one per ready worker. places_on: how many jobs a worker runs at a time, by device.
    now: seconds since the epoch. candidate: is simulated too, with the id `CANDIDATE_ID`.
    """
    done = [
        FinishedWork(row.pixels, row.work / row.pixels, row.finished_at, row.run_s)
        for row in connection.execute(RECENTLY_FINISHED)
    ]
    rows = connection.execute(BACKLOG).all()
    left = [
        PendingWork(row.id, row.state == JobState.RUNNING, row.pixels, row.remaining / row.pixels)
        for row in rows
    ]
    if candidate is not None:
        steps = candidate.work / candidate.pixels
        pending = PendingWork(CANDIDATE_ID, False, candidate.pixels, steps)
        left.insert(place_of(candidate, rows), pending)
    places = sum(map(places_on, devices)) or places_on("")
    pause_s = 0.0 if devices else START_S
    forecast = simulate(left, places, measure_throughput(done, len(devices), now), pause_s=pause_s)
    return replace(forecast, is_measured=bool(devices and done))


def place_of(candidate: Candidate, rows: Sequence[Row[*tuple[Any, ...]]]) -> int:
    """The index at which a candidate is claimed. rows: of `BACKLOG`."""
    order = (-candidate.priority, candidate.turn)
    return sum(row.state == JobState.RUNNING or (-row.priority, row.turn) <= order for row in rows)


@dataclass(slots=True)
class Estimator:
    """Caches the latest forecast. Synchronous; safe for several threads.

    read: makes a forecast, with a job that is not submitted yet where one is given.
    clock: monotonic seconds.
    """

    read: Callable[[NewJob | None], Forecast]
    clock: Callable[[], float] = time.monotonic
    _latest: tuple[Forecast, float, float] | None = field(default=None, init=False)

    def forecast(self, job_id: int | None = None) -> Forecast:
        """The latest forecast, or a new one when that is too old.

        job_id: a recent forecast is enough if it contains this job.
        Raises: sqlalchemy.exc.SQLAlchemyError.
        """
        now = self.clock()
        if self._latest is not None:
            latest, made_at, took_s = self._latest
            is_known = job_id in latest.ends_s
            cached_s = COST_FACTOR * took_s
            if now - made_at < (max(cached_s, CACHED_S) if is_known else cached_s):
                return latest
        made = self.read(None)
        self._latest = made, now, self.clock() - now
        return made

    def check_deadline(self, new: NewJob) -> None:
        """Refuse a job that would not end in time if it were submitted now.

        The margin of estimates is left out, and a guess refuses nothing.
        Raises: DeadlineUnmeetable; sqlalchemy.exc.SQLAlchemyError.
        """
        if new.deadline_s is None:
            return
        forecast = self.read(new)
        if forecast.is_measured and forecast.ends_s[CANDIDATE_ID] > new.deadline_s:
            raise DeadlineUnmeetable(forecast.eta_s(CANDIDATE_ID))


class QuotedEstimates:
    """The first estimate given to a client for each job, to compare with the true time.

    For one event loop. clock: seconds since the epoch, like the times in rows.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._quoted: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def quote(self, job_id: int, eta_s: float) -> float:
        """Record the estimate if it is the job's first; returns it."""
        self._quoted.setdefault(job_id, (self._clock(), eta_s))
        if len(self._quoted) > MAX_QUOTED:
            self._quoted.popitem(last=False)
        return eta_s

    def pop_ratio(self, job_id: int, ended_at: float) -> float | None:
        """First estimate divided by the true seconds; None when it was given after the end."""
        quoted_at, eta_s = self._quoted.pop(job_id, (ended_at, 0.0))
        return eta_s / (ended_at - quoted_at) if ended_at > quoted_at else None
