"""`CircuitBreakers`: stop calls to hosts that keep failing, and probe them from time to time.

    closed ──N failures in a row──> open ──interval is over──> half-open: one probe
      ^                              ^                            │
      │                              └──failure, twice the interval
      └──────────────any response of a working host───────────────┘

Calls to an open host stay rows. The state belongs to one process and is not shared with others.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_HOSTS = 10_000
"""Limit of failing hosts. Above it the host whose last failure is oldest is removed."""

MAX_OPEN_S = 900.0


@dataclass(slots=True)
class CircuitBreaker:
    """failures: in a row. open_s: length of the open interval, 0 while closed. until_s: its end."""

    failures: int = 0
    open_s: float = 0.0
    until_s: float = 0.0
    is_probed: bool = False


class CircuitBreakers:
    """threshold: failures in a row that open a breaker, for `first_open_s` at first.

    Not safe for several threads. clock: monotonic seconds.
    """

    def __init__(
        self, threshold: int, first_open_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._threshold = threshold
        self._first_open_s = first_open_s
        self._clock = clock
        self._breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()

    @property
    def open_hosts(self) -> list[str]:
        """Hosts that get no calls but probes."""
        return [host for host, breaker in self._breakers.items() if breaker.open_s]

    @property
    def due_for_probe(self) -> list[str]:
        """Open hosts whose interval is over and that no probe is calling."""
        now = self._clock()
        return [
            host
            for host, breaker in self._breakers.items()
            if breaker.open_s and not breaker.is_probed and breaker.until_s <= now
        ]

    def begin_probe(self, host: str) -> None:
        """A call to an open host begins. An earlier call may have closed its breaker meanwhile."""
        if host in self._breakers:
            self._breakers[host].is_probed = True

    def end_probe(self, host: str) -> None:
        """The probe has ended, perhaps without a result."""
        if host in self._breakers:
            self._breakers[host].is_probed = False

    def record_success(self, host: str) -> None:
        """Close the breaker, because the host has responded."""
        self._breakers.pop(host, None)

    def record_failure(self, host: str) -> bool:
        """Count a failure; True where it opens the breaker, also again after a probe."""
        breaker = self._breakers.setdefault(host, CircuitBreaker())
        self._breakers.move_to_end(host)
        if len(self._breakers) > MAX_HOSTS:
            self._breakers.popitem(last=False)
        breaker.failures += 1
        # A call that began before the breaker opened does not prolong the interval.
        is_late = breaker.open_s > 0 and not breaker.is_probed
        if breaker.failures < self._threshold or is_late:
            return False
        breaker.open_s = min(breaker.open_s * 2 or self._first_open_s, MAX_OPEN_S)
        breaker.until_s = self._clock() + breaker.open_s
        breaker.is_probed = False
        return True
