"""`CircuitBreakers`: hosts that fail again and again are spared, and asked from time to time.

    closed ──N failures in a row──> held ──time is up──> probed: one call
      ^                              ^                      │
      │                              └──failure, twice as long
      └──────────────any answer of a working host───────────┘

What waits for a held host stays where it is. Belongs to one process: each finds out for itself.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_HOSTS = 10_000
"""Failing hosts remembered at a time; past that the one that failed longest ago is forgotten."""

MAX_HOLD_S = 900.0


@dataclass(slots=True)
class CircuitBreaker:
    """failures: in a row. hold_s: the present hold's length, 0 while closed. until_s: its end."""

    failures: int = 0
    hold_s: float = 0.0
    until_s: float = 0.0
    is_probed: bool = False


class CircuitBreakers:
    """threshold: failures in a row that hold a host, for `first_hold_s` at first.

    Not safe for several threads. clock: monotonic seconds.
    """

    def __init__(
        self, threshold: int, first_hold_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._threshold = threshold
        self._first_hold_s = first_hold_s
        self._clock = clock
        self._circuits: OrderedDict[str, CircuitBreaker] = OrderedDict()

    @property
    def held(self) -> list[str]:
        """Hosts that get no calls but probes."""
        return [host for host, circuit in self._circuits.items() if circuit.hold_s]

    @property
    def due_for_probe(self) -> list[str]:
        """Held hosts whose time is up and that nobody is asking."""
        now = self._clock()
        return [
            host
            for host, circuit in self._circuits.items()
            if circuit.hold_s and not circuit.is_probed and circuit.until_s <= now
        ]

    def begin_probe(self, host: str) -> None:
        """One call to a held host is under way."""
        self._circuits[host].is_probed = True

    def end_probe(self, host: str) -> None:
        """It ended without telling anything of the host."""
        if host in self._circuits:
            self._circuits[host].is_probed = False

    def note_success(self, host: str) -> None:
        """The host works: it answered, whatever it said."""
        self._circuits.pop(host, None)

    def note_failure(self, host: str) -> bool:
        """The host did not work; True when it is held from now on, or still after a probe."""
        circuit = self._circuits.setdefault(host, CircuitBreaker())
        self._circuits.move_to_end(host)
        if len(self._circuits) > MAX_HOSTS:
            self._circuits.popitem(last=False)
        circuit.failures += 1
        is_late = circuit.hold_s > 0 and not circuit.is_probed  # a call from before it was held
        if circuit.failures < self._threshold or is_late:
            return False
        circuit.hold_s = min(circuit.hold_s * 2 or self._first_hold_s, MAX_HOLD_S)
        circuit.until_s = self._clock() + circuit.hold_s
        circuit.is_probed = False
        return True
