"""A worker, its clients and their clock, simulated: what estimates are worth under random load.

The worker makes jobs side by side as the engine does: a step of each in turn, jobs of one size
sharing a call, whose cost grows with its rows beyond a fixed part.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.jobs.estimates import FinishedWork, Forecast, PendingWork, measure_throughput, simulate

SIZES = (256, 512, 512, 512, 768, 1_024)
STEPS = (10, 20, 20, 30, 50)


@dataclass(frozen=True, slots=True)
class Device:
    """Seconds per megapixel.

    places: jobs side by side. call_s, row_s: of a UNet call, and of each of its rows. end_s: of
    encoding and decoding a picture, while nothing else goes on.
    """

    places: int
    call_s: float
    row_s: float
    end_s: float


CPU = Device(places=8, call_s=0.02, row_s=0.9, end_s=3.0)
GPU = Device(places=16, call_s=0.012, row_s=0.017, end_s=0.15)


@dataclass(slots=True)
class Job:
    """Seconds are those of the simulation."""

    id: int
    side: int
    samples: int
    steps: int
    submitted_at: float
    claimed_at: float = 0.0
    done: int = 0
    ended_at: float | None = None

    @property
    def pixels(self) -> float:
        return float(self.samples * self.side**2)


@dataclass(frozen=True, slots=True)
class Told:
    """What a client was told, and what came of it."""

    eta_s: float
    true_s: float


@dataclass(slots=True)
class Simulation:
    """clients: each asks for one job after another, and rests in between. hold_s: until it is told.

    mixed: sizes, steps and samples differ from job to job.
    """

    device: Device
    clients: int
    hold_s: float
    rest_s: float
    is_mixed: bool
    seed: int
    now: float = 0.0
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _pending: list[tuple[Job, float, float]] = field(default_factory=list)
    _count: int = 0
    _last_id: int = 0

    def run(self, jobs: int) -> list[Told]:
        """Go on until so many jobs have ended; what was told of each but the first few."""
        chance = random.Random(self.seed)
        for _ in range(self.clients):
            self._at(chance.uniform(0, self.rest_s), lambda: self._submit(chance))
        while len(self.done) < jobs:
            self._happen()
            self._work(chance)
        ended = {job.id: job for job in self.done}
        known = [(job, at, eta) for job, at, eta in self._pending if job.id in ended]
        skipped = max(10, 2 * self.clients)  # nothing was known of the device
        return [Told(eta, (job.ended_at or 0.0) - at) for job, at, eta in known if job.id > skipped]

    def _at(self, moment: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (moment, self._count, act))

    def _happen(self) -> None:
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()

    def _submit(self, chance: random.Random) -> None:
        self._last_id += 1
        job = Job(
            id=self._last_id,
            side=chance.choice(SIZES) if self.is_mixed else 512,
            samples=chance.choice((1, 1, 1, 2, 4)) if self.is_mixed else 1,
            steps=chance.choice(STEPS) if self.is_mixed else 20,
            submitted_at=self.now,
        )
        self.waiting.append(job)
        self._at(self.now + self.hold_s, lambda: self._tell(job))

    def _tell(self, job: Job) -> None:
        if job.ended_at is None:
            self._pending.append((job, self.now, self._forecast().eta_s(job.id)))

    def _forecast(self) -> Forecast:
        live = [
            PendingWork(job.id, is_running, job.pixels, job.steps - job.done)
            for is_running, jobs in ((True, self.running), (False, self.waiting))
            for job in jobs
        ]
        recent = [
            FinishedWork(job.pixels, job.steps, job.ended_at, job.ended_at - job.claimed_at)
            for job in self.done[-20:]
            if job.ended_at is not None
        ]
        return simulate(live, self.device.places, measure_throughput(recent, 1, self.now), 0.0)

    def _work(self, chance: random.Random) -> None:
        """One round, or the time until something happens."""
        while self.waiting and len(self.running) < self.device.places:
            job = self.waiting.pop(0)
            job.claimed_at = self.now
            self.running.append(job)
            self.now += self._end_s(job) / 2
        if not self.running:
            self.now = max(self.now, self._events[0][0])
            return
        for side in sorted({job.side for job in self.running}):
            rows = sum(job.samples for job in self.running if job.side == side)
            self.now += (self.device.call_s + self.device.row_s * rows) * side**2 / 1e6
        for job in [*self.running]:
            job.done += 1
            if job.done == job.steps:
                self.now += self._end_s(job) / 2
                job.ended_at = self.now
                self.running.remove(job)
                self.done.append(job)
                back_at = self.now + chance.expovariate(1 / self.rest_s)
                self._at(back_at, lambda: self._submit(chance))

    def _end_s(self, job: Job) -> float:
        return self.device.end_s * job.pixels / 1e6


def share_in_time(told: Sequence[Told]) -> float:
    """Of those told, how many had ended when they came back after the estimate."""
    return sum(each.true_s <= each.eta_s for each in told) / len(told)
