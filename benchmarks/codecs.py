"""How long the PNG codecs take on one core, and for how long they keep other threads from running.

A part of `benchmarks.host`. The picture is a photograph as far as a codec can tell, and is
compressed to about half. Pillow with its own settings is what the obvious server would use.
"""

import io
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.imaging.decoding import ImageLimits, decode_image
from models.imaging.images import encode_png

SIDES_PX = (512, 1024)
REPEATS = 15


@dataclass(frozen=True, slots=True)
class CodecTime:
    """Milliseconds: the median call, and the longest that another thread did not run meanwhile."""

    name: str
    side_px: int
    call_ms: float
    stall_ms: float


class Ticker:
    """A thread that wants to run all the time. Use as a context manager around what may not let it.

    longest_s: between two turns of it.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._is_stopping:
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last)
            last = now
            time.sleep(0)  # lets others go first, and comes back at once


def measure_codecs() -> list[CodecTime]:
    """Both directions, ours and Pillow's, by size."""
    return [
        time_codec(name, side_px, call)
        for side_px in SIDES_PX
        for name, call in codecs_for(photograph(side_px)).items()
    ]


def photograph(side_px: int) -> NDArray[np.uint8]:
    """`(side, side, 3)`: a few soft shapes under a sensor's noise."""
    generator = np.random.default_rng(0)
    shapes = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
    soft = np.asarray(shapes.resize((side_px, side_px), Image.Resampling.BICUBIC), np.float32)
    noisy = soft + generator.normal(0, 3, soft.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def codecs_for(picture: NDArray[np.uint8]) -> dict[str, Callable[[], object]]:
    """Calls by name. picture: `(h, w, 3)` uint8."""
    ours, theirs = encode_png(picture), encode_with_pillow(picture)
    return {
        "encode": lambda: encode_png(picture),
        "encode, Pillow": lambda: encode_with_pillow(picture),
        "decode": lambda: decode_image(ours, ImageLimits()),
        "decode of Pillow's": lambda: decode_image(theirs, ImageLimits()),
    }


def encode_with_pillow(picture: NDArray[np.uint8]) -> bytes:
    """A PNG by Pillow's defaults."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def time_codec(name: str, side_px: int, call: Callable[[], object]) -> CodecTime:
    """Alone for the time; once more beside another thread for the stall."""
    call()
    times_s = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - began)
    with Ticker() as ticker:
        for _ in range(REPEATS):
            call()
    return CodecTime(name, side_px, 1000 * statistics.median(times_s), 1000 * ticker.longest_s)
