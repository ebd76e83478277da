"""`Moment`: times of the device, read without waiting for it."""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Moment:
    """When the device had done all that was started before.

    host_s: `time.perf_counter`; it counts where calls return when they are done, on a CPU.
    event: on a GPU, where calls return early.
    """

    host_s: float
    event: torch.cuda.Event | None = None

    @classmethod
    def now(cls, device: torch.device) -> "Moment":
        """Raises: the errors of torch."""
        if device.type != "cuda":
            return cls(time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return cls(time.perf_counter(), event)

    def seconds_to(self, later: "Moment") -> float | None:
        """The device's seconds between the two; None while it has not come to the later one."""
        if self.event is None or later.event is None:
            return later.host_s - self.host_s
        try:
            is_past = later.event.query()  # type: ignore[no-untyped-call]
            return self.event.elapsed_time(later.event) / 1000 if is_past else None
        except RuntimeError:  # of a lost device: the next call of a model reports it
            return None
