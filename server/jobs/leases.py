"""`HeartbeatMonitor`: how long somebody has said nothing, whatever the wall clocks say.

Workers show that they live, and that they still hold a job, by writing the time into a row. To
another process that time is a word like any other: machines' clocks differ, and each may jump by
days. So it is compared with the word before it and never with a clock. Who watches counts, by its
own steady clock, for how long the same word has stood there.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K")

LOOK_S = 5.0
"""Between two looks."""

LONGEST_GAP_S = 2 * LOOK_S
"""A longer time without a look counts as so much. The database may have been away, or the whole
machine asleep: nobody could speak then, and all would seem dead at the first look afterwards."""


class HeartbeatMonitor(Generic[K]):
    """Of many speakers, each known by a key. Safe for several threads. clock: steady seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = clock()
        self._heard: dict[K, tuple[float, float]] = {}

    def look(
        self, words: Mapping[K, float], guess: Callable[[float], float] = lambda word: 0.0
    ) -> dict[K, float]:
        """Seconds for which each has been silent, as far as has been seen here.

        words: the last one of everybody there is; who is missing is forgotten.
        guess: the seconds that somebody starts with who was not there at the look before.
        """
        with self._lock:
            now = self._clock()
            gap_s = min(now - self._looked_at, LONGEST_GAP_S)
            self._looked_at = now
            heard = {}
            for who, word in words.items():
                last, silent_s = self._heard.get(who, (None, 0.0))
                if last is None:
                    heard[who] = (word, guess(word))
                else:
                    heard[who] = (word, silent_s + gap_s if word == last else 0.0)
            self._heard = heard
            return {who: silent_s for who, (_, silent_s) in heard.items()}
