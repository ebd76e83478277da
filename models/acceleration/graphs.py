"""UNet calls as CUDA graphs: the kernels of a call are recorded once and then started as one.

A step of Stable Diffusion 1.5 is some 490 kernels; at 512×512 a fast GPU works through two rows of
them in a third of the time that the host needs to start them one by one. The recorded kernels are
those of the eager call, so the result is the same to the last bit.

A recording is tied to addresses: of its inputs, which are filled before each replay, of its result,
which is copied out, and of the weights, which must not move.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from models.acceleration.unet import CallSize, UNetCall, UNetInputs, UNetRows

logger = logging.getLogger(__name__)

ROW_BUCKETS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
"""Rows of recordings. Calls of fewer are padded: most have an even number, which costs them a
seventh at most, and that only from 14 rows on."""

SAMPLE_ROWS = (1, 2)
"""Rows of one sample: without and with guidance."""

LAUNCH_BOUND_AREA = 32 * 64 * 64
"""Latent pixels of all rows beyond which no call is recorded. The fastest cards are busy with so
many for some 50 ms, and a host starts the kernels one by one in 25 to 35 ms, in which it does
nothing else; beyond that a recording would gain little, and its memory grows with the rows."""

WARM_UPS = 2
"""Calls before a recording, in which libraries choose their kernels and get their workspaces."""

SPARE_BYTES = 2 * 2**30
"""Free device memory below which torch's cache is emptied before a recording, which cannot take
from it. To do so each time costs more than the recording: all is asked for anew afterwards."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """max_bytes: device memory that all recordings may hold.

    is_padded: a call may be made with more rows than it needs. Without it, what else runs cannot
        move the last bits of a result, as every call is for one sample then.
    in_use_calls: a size that came up within so many calls is in use, and keeps its recordings:
        sizes take turns, and to record each at its turn is slower than to record none.
    """

    max_bytes: int
    is_padded: bool = True
    in_use_calls: int = 500


class RecordingBroken(Exception):
    """A recording was cut off, which leaves torch in the middle of it: in this process every later
    one would fail, and every replay."""


class Recording(Protocol):
    """A call that can be made again. held_bytes: device memory that its pool has grown by."""

    @property
    def output(self) -> Tensor: ...

    @property
    def held_bytes(self) -> int: ...

    def replay(self) -> None:
        """Read the inputs it was recorded with, write `output`."""
        ...


class Recorder(Protocol):
    """Makes recordings."""

    def new_pool(self) -> Any:
        """Memory that recordings share: they run one at a time, and results are copied out."""
        ...

    def warm_up(self, call: UNetCall, inputs: UNetInputs) -> None:
        """Make the call as it will be recorded: libraries choose kernels and get workspaces.

        Raises: what the call raises.
        """
        ...

    def record(self, call: UNetCall, inputs: UNetInputs, pool: Any) -> Recording:
        """Raises: torch.OutOfMemoryError, RecordingBroken."""
        ...


@dataclass(slots=True)
class SizeRecordings:
    """The recordings of one size, by rows; they share a pool and go together.

    A pool gives its memory back as a whole, so there is one for each size and not one for all.
    used_at: the latest call that was of this size, counted from the first one.
    held_bytes: device memory of the pool, with that of recordings that were dropped one by one.
    """

    pool: Any
    used_at: int = 0
    held_bytes: int = 0
    by_rows: dict[int, tuple[UNetInputs, Recording]] = field(default_factory=dict)

    def add(self, rows: int, inputs: UNetInputs, recording: Recording) -> None:
        """Keep a recording that was made in the pool."""
        self.by_rows[rows] = inputs, recording
        self.held_bytes += recording.held_bytes


class GraphedUNet:
    """Replays where that pays and memory allows, and makes the plain call where not.

    Sizes are recorded when they first come up. Where memory is short, one that is no longer in use
    makes room; what found none is tried again later.
    """

    def __init__(
        self, call: UNetCall, weights: Sequence[Tensor], recorder: Recorder, limits: GraphLimits
    ) -> None:
        self._call = call
        self._weights = weights
        self._recorder = recorder
        self._limits = limits
        self._calls = 0
        self._sizes: OrderedDict[CallSize, SizeRecordings] = OrderedDict()
        self._refused_until: dict[tuple[CallSize, int], float] = {}
        self._is_broken = False
        self._recorded_from = self._origin()

    @property
    def held_bytes(self) -> int:
        """Device memory of all recordings."""
        return sum(size.held_bytes for size in self._sizes.values())

    def __call__(self, shares: Sequence[UNetRows]) -> Tensor:
        self._calls += 1
        size, rows = CallSize.of(shares[0]), sum(share.rows for share in shares)
        recorded = self._find(size, self._padded(rows), shares)
        if recorded is None:
            return self._call(UNetInputs.gather(shares))
        inputs, recording = recorded
        inputs.fill(shares)
        recording.replay()
        # The next replay overwrites it, and some schedulers keep predictions for later steps.
        return recording.output[:rows].clone()

    def recorded_rows(self, area: int) -> list[int]:
        """The numbers of rows that are recorded, for rows of `area` latent pixels."""
        buckets = ROW_BUCKETS if self._limits.is_padded else SAMPLE_ROWS
        return [rows for rows in buckets if rows * area <= LAUNCH_BOUND_AREA]

    def release(self) -> None:
        """Release all recordings. A size is recorded again at its next call."""
        self._sizes.clear()
        self._refused_until.clear()

    def _padded(self, rows: int) -> int:
        if not self._limits.is_padded:
            return rows
        return next((bucket for bucket in ROW_BUCKETS if bucket >= rows), rows)

    def _find(
        self, size: CallSize, rows: int, shares: Sequence[UNetRows]
    ) -> tuple[UNetInputs, Recording] | None:
        """The recording of a size, made if need be; None where the plain call is to be made."""
        if self._origin() != self._recorded_from:
            logger.info("weights of the UNet have moved, its graphs are made anew")
            self.release()
            self._recorded_from = self._origin()
        known = self._sizes.get(size)
        if known is not None:
            known.used_at = self._calls
            self._sizes.move_to_end(size)
            if rows in known.by_rows:
                return known.by_rows[rows]
        is_worthwhile = rows * size.area <= LAUNCH_BOUND_AREA
        is_refused = self._calls < self._refused_until.get((size, rows), 0)
        if self._is_broken or not is_worthwhile or is_refused:
            return None
        return self._record(size, rows, shares)

    def _record(
        self, size: CallSize, rows: int, shares: Sequence[UNetRows]
    ) -> tuple[UNetInputs, Recording] | None:
        recordings = self._sizes.get(size) or SizeRecordings(self._recorder.new_pool())
        try:
            inputs = UNetInputs.room_for(rows, shares[0])
            inputs.fill(shares)
            self._recorder.warm_up(self._call, inputs)
            recording = self._recorder.record(self._call, inputs, recordings.pool)
        except torch.OutOfMemoryError:
            logger.warning("no memory for a graph of %s, %d rows", size, rows)
            self._refuse(size, rows)
            return None
        except RecordingBroken:
            # If the device itself is lost, the plain call that follows finds that out.
            logger.warning("graphs cannot be used any more, plain calls go on", exc_info=True)
            self._is_broken = True
            self.release()
            return None
        recordings.add(rows, inputs, recording)
        recordings.used_at = self._calls
        self._sizes[size] = recordings
        self._sizes.move_to_end(size)
        self._make_room(size, rows)
        return inputs, recording

    def _make_room(self, size: CallSize, rows: int) -> None:
        """Drop the sizes that are not in use until the rest fits, or else this new recording."""
        while self.held_bytes > self._limits.max_bytes:
            oldest, recordings = next(iter(self._sizes.items()))
            if self._calls - recordings.used_at < self._limits.in_use_calls:
                logger.info("graphs of sizes in use leave no room for %s, %d rows", size, rows)
                self._refuse(size, rows)
                del self._sizes[size].by_rows[rows]
                if not self._sizes[size].by_rows:
                    del self._sizes[size]
                return
            del self._sizes[oldest]

    def _refuse(self, size: CallSize, rows: int) -> None:
        """Make the plain call for a while."""
        self._refused_until[size, rows] = self._calls + self._limits.in_use_calls

    def _origin(self) -> tuple[int, ...]:
        """What recordings depend on: the addresses of the weights."""
        return tuple(weight.data_ptr() for weight in self._weights)


@dataclass(frozen=True, slots=True)
class CudaRecording:
    """A `Recording` of a CUDA device."""

    graph: torch.cuda.CUDAGraph
    output: Tensor
    held_bytes: int

    def replay(self) -> None:
        """Start it on the current stream."""
        self.graph.replay()


class CudaRecorder:
    """Records on a stream of its own, as the libraries under torch ask for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def warm_up(self, call: UNetCall, inputs: UNetInputs) -> None:
        # On the current stream: the allocator's cache of freed memory is one for each stream, and
        # what the recording's stream had left over, up to gigabytes, no later call could use.
        with torch.cuda.device(self._device):
            for _ in range(WARM_UPS):
                call(inputs)

    def record(self, call: UNetCall, inputs: UNetInputs, pool: Any) -> CudaRecording:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._get_workspace(inputs.latents.dtype)
            torch.cuda.synchronize()
            if free_bytes() < SPARE_BYTES:
                torch.cuda.empty_cache()
            before = held_by(pool)
            try:
                graph, output = self._capture(call, inputs, pool)
            finally:
                torch.cuda.set_stream(current)  # a capture that cannot be ended leaves its own
            after = held_by(pool)
            return CudaRecording(graph, output, after - before)

    def _get_workspace(self, dtype: torch.dtype) -> None:
        """Have cuBLAS allocate what it keeps for a stream, which must not come from a pool."""
        with torch.cuda.stream(self._stream):
            numbers = torch.zeros(16, 16, dtype=dtype, device=self._device)
            torch.nn.functional.linear(numbers @ numbers, numbers, numbers[0])

    def _capture(
        self, call: UNetCall, inputs: UNetInputs, pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                # Other threads of this process may go on using the device.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    output = call(inputs)
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:  # asking for memory does not cut a recording off
            raise
        except RuntimeError as error:
            raise RecordingBroken from error
        return graph, output


def held_by(pool: Any) -> int:
    """Device memory of a pool now."""
    return pool_bytes(torch.cuda.memory_snapshot(), pool)  # type: ignore[no-untyped-call]


def pool_bytes(segments: Iterable[Mapping[str, Any]], pool: Any) -> int:
    """Device memory that torch's allocator holds for a pool, of a `memory_snapshot`.

    The difference of free memory would count what other threads and processes take meanwhile.
    """
    return sum(
        segment["total_size"]
        for segment in segments
        if tuple(segment["segment_pool_id"]) == tuple(pool)
    )


def free_bytes() -> int:
    """Free memory of the current device, without torch's own cache of free blocks."""
    return torch.cuda.mem_get_info()[0]
