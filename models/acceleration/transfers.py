"""Between host and device without waiting.

A device works through a queue; the host may run ahead of it as long as it asks for no result and
copies nothing from or to pageable memory. Results are copied to pinned memory, and a `Mark` behind
the copy tells when they are there. diffusers' schedulers keep their tables where the samples are
and copy numbers to and fro; here the tables stay on the host, and numbers travel as arguments of
the operations that use them.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FACTORIES: set[Callable[..., Any]] = {torch.ones, torch.zeros, torch.tensor}

MOST_HOST_NUMBERS = 16
"""A table of a solver's coefficients is smaller, the noise of the smallest picture larger."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the copy is queued like any other work.

    The pinned memory it is read from is kept by torch until the copy has been made.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Mark(Protocol):
    """A place in the device's queue."""

    @property
    def is_past(self) -> bool:
        """Whether the device has done all that was queued before."""
        ...

    def wait(self) -> None:
        """Wait until it is past."""
        ...

    def s_since(self, earlier: Any) -> float:
        """Seconds of the device since an earlier mark of its kind; both are past."""
        ...


@dataclass(frozen=True, slots=True)
class HostMark:
    """A mark of the CPU, which has no queue: a call has done its work when it returns."""

    at_s: float = field(default_factory=time.perf_counter)
    is_past: bool = True

    def wait(self) -> None:
        """It is past."""

    def s_since(self, earlier: "HostMark") -> float:
        return self.at_s - earlier.at_s


class CudaMark:
    """An event in the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        # Blocking: a thread that waits sleeps, and leaves its core to the others.
        new_event: Any = torch.cuda.Event
        self._event = new_event(enable_timing=True, blocking=True)
        self._event.record(torch.cuda.current_stream(device))

    @property
    def is_past(self) -> bool:
        is_past: bool = self._event.query()
        return is_past

    def wait(self) -> None:
        self._event.synchronize()

    def s_since(self, earlier: "CudaMark") -> float:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000


QUEUES: dict[str, Callable[[torch.device], Mark]] = {"cuda": CudaMark}
"""The types of devices that have a queue, and their marks."""


def mark(device: torch.device) -> Mark:
    """The end of what is queued now."""
    return QUEUES[device.type](device) if device.type in QUEUES else HostMark()


def download(tensor: Tensor) -> Tensor:
    """The tensor on the host, whose values are there once a later mark is past."""
    if tensor.device.type not in QUEUES:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def host_tables(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, a scheduler's arithmetic does not make the host wait for this device."""
    return nullcontext() if device.type == "cpu" else HostTables(device)


class HostTables(TorchFunctionMode):
    """Small tables stay on the host, where they are asked to go to the device; noise is queued.

    Values are those of the plain code: a host scalar takes part in a device's operation in full
    precision. What stays on the host and is no scalar, such as the weights with which
    `UniPCMultistepScheduler` sums its history, goes to the device when it meets it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and args[0].device.type == "cpu" and self._is_target(args, kwargs):
            if args[0].numel() > MOST_HOST_NUMBERS:
                return func(upload(args[0], self._device), *args[1:], **kwargs)
            return func(args[0], *without_device(args[1:]), **without_device_keyword(kwargs))
        if func in FACTORIES:
            return func(*args, **without_device_keyword(kwargs))
        if func is torch.einsum:
            return func(args[0], *(self._uploaded(each) for each in args[1:]), **kwargs)
        return func(*args, **kwargs)

    def _is_target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of `Tensor.to` names the device."""
        asked = kwargs.get("device", args[1] if len(args) > 1 else None)
        return isinstance(asked, str | torch.device) and torch.device(asked) == self._device

    def _uploaded(self, tensor: Tensor) -> Tensor:
        return upload(tensor, self._device) if tensor.device.type == "cpu" else tensor


def without_device(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments of `Tensor.to`; its first is a device or a dtype."""
    return tuple(each for each in arguments if not isinstance(each, str | torch.device))


def without_device_keyword(keywords: dict[str, Any]) -> dict[str, Any]:
    """So that the result is made, or stays, on the host."""
    return {name: value for name, value in keywords.items() if name != "device"}
