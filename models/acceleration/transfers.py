"""From the host to the device without waiting, for the loop of denoising steps.

A device works through a queue; the host may run ahead of it as long as it asks for no result and
copies nothing from pageable memory. diffusers' schedulers keep their tables where the samples are
and copy numbers to and fro; here the tables stay on the host, and numbers travel as arguments of
the operations that use them.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
