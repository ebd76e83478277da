"""An accelerator on paper: tensors that say they live on another device, with values on the host.

It keeps the rules a real one has, so that code for a GPU can be run where there is none: tensors of
two devices do not mix (but for host scalars), whatever would make the host wait for the device is
written down, and what is copied to pinned memory is not there before a later mark is past. It
claims to be "meta", the one device type besides the CPU that every build of torch knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from models.acceleration.transfers import QUEUES

PAPER = torch.device("meta")

WAITS = {
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten.nonzero",
    "aten._linalg_check_errors",
    "aten._linalg_solve_ex",
    "aten.linalg_solve_ex",
    "aten.bincount",
    "aten._unique2",
    "aten.repeat_interleave",
}
"""Operations whose result, or its shape, the host must know before it can go on."""

WHOLE = {"aten.conv2d", "aten.group_norm", "aten.linear", "aten.scaled_dot_product_attention"}
"""Composites that the host runs as one, with rounding of its own."""

INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


LAG = 3
"""Marks that are made before the device reaches one that nobody waits for."""


class PaperTensor(Tensor):
    """Looks like a tensor of the paper device; `on_host` has its values."""

    on_host: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "PaperTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=PAPER,
        )

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.on_host = values

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        raise RuntimeError(f"{func}: paper tensors need their device to be switched on")


class PaperDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, the paper device exists.

    waits: what made the host wait until the queue was empty, in order. operations: queued so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.operations = 0
        self._pinned: list[Tensor] = []
        self._marks = 0
        self._reached = 0
        self._copies: list[tuple[int, Callable[[], object]]] = []
        self._depth = 0

    def __enter__(self) -> "PaperDevice":
        self._depth += 1
        QUEUES[PAPER.type] = self.mark
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            del QUEUES[PAPER.type]

    def mark(self, _device: torch.device) -> "PaperMark":
        self._marks += 1
        self.reach(self._marks - LAG)
        return PaperMark(self, self._marks, self.operations)

    @property
    def reached(self) -> int:
        """The number of the latest mark that is past."""
        return self._reached

    @torch.inference_mode()  # as the tensors were made in it
    def reach(self, number: int) -> None:
        """Work up to a mark: copies before it arrive."""
        self._reached = max(self._reached, number)
        while self._copies and self._copies[0][0] < self._reached:
            self._copies.pop(0)[1]()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        if name == "aten.is_pinned":
            return self._is_pinned(args[0])
        if name in ("aten.pin_memory", "aten._pin_memory"):  # needs a driver
            self._pinned.append(args[0])
            return args[0]
        if kwargs.pop("pin_memory", None):
            self._pinned.append(func(*tree_map(values_of, args), **kwargs))
            return self._pinned[-1]
        if is_composite(func) and name not in WHOLE:
            with self:  # in inference mode they arrive whole
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_on_paper = any(isinstance(each, PaperTensor) for each in tensors)
        target = kwargs.get("device")
        if any(each.device == PAPER and not isinstance(each, PaperTensor) for each in tensors):
            # `torch.tensor(…, device=…)` is the one maker of tensors that passes us by.
            raise RuntimeError(f"{name}: a tensor was copied from the host element by element")
        if name == "aten._to_copy":
            self._note_copy(tensors[0], target, bool(kwargs.get("non_blocking")))
        elif name == "aten.copy_":
            is_asynchronous = bool((*args, kwargs.get("non_blocking", False))[2])
            if is_asynchronous and self._is_pinned(tensors[0]) and is_on_paper:
                return self._copy_later(*tensors)
            self._note_copy(tensors[1], tensors[0].device, is_asynchronous)
        elif is_on_paper:
            self.operations += 1
            self._check_devices(name, tensors)
            self._note_wait(name, args)
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
            is_on_paper = torch.device(target) == PAPER
        answer = func(*tree_map(values_of, args), **tree_map(values_of, kwargs))
        if func._schema.is_mutable or not is_on_paper or name == "aten._local_scalar_dense":
            return in_place_answer(args, answer) if is_on_paper else answer
        return tree_map(on_paper, answer)

    def _copy_later(self, target: Tensor, source: Tensor) -> Tensor:
        values = values_of(source).clone()  # later operations may change it
        self._copies.append((self._marks, lambda: target.copy_(values)))
        return target

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.data_ptr() == each.data_ptr() for each in self._pinned)

    def _note_copy(self, source: Tensor, target: Any, is_asynchronous: bool) -> None:
        device = source.device if target is None else torch.device(target)
        if device == source.device:
            return
        if device != PAPER or not (is_asynchronous and self._is_pinned(source)):
            self.waits.append(f"copy {source.device.type} to {device.type} {[*source.shape]}")

    def _note_wait(self, name: str, args: tuple[Any, ...]) -> None:
        indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor)]
        is_by_mask = name in INDEXING and any(each.dtype == torch.bool for each in indices)
        is_from_host = name in INDEXING and any(each.device != PAPER for each in indices)
        if name in WAITS or is_by_mask or is_from_host:
            self.waits.append(name)

    def _check_devices(self, name: str, tensors: Sequence[Tensor]) -> None:
        strangers = [each for each in tensors if each.device != PAPER and each.ndim > 0]
        if strangers and name not in INDEXING:
            raise RuntimeError(f"{name}: a host tensor {[*strangers[0].shape]} among paper tensors")


@dataclass(frozen=True, slots=True)
class PaperMark:
    """A place in the queue. operations: of the device when it was made."""

    device: PaperDevice
    number: int
    operations: int

    @property
    def is_past(self) -> bool:
        return self.number <= self.device.reached

    def wait(self) -> None:
        if not self.is_past and self.operations == self.device.operations:
            self.device.waits.append("mark")
        self.device.reach(self.number)

    def s_since(self, earlier: "PaperMark") -> float:
        """Each operation takes as long."""
        return (self.operations - earlier.operations) / 1000


def is_composite(func: Any) -> bool:
    """Whether an operation is defined by others, which say more about what it does."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def values_of(leaf: Any) -> Any:
    """The host tensor under a paper tensor; anything else as it is."""
    return leaf.on_host if isinstance(leaf, PaperTensor) else leaf


def on_paper(leaf: Any) -> Any:
    """A host tensor on the paper device; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    # A view of a weight must be what the weight is: no inference tensor.
    with torch.inference_mode(False):
        return PaperTensor(leaf)


def in_place_answer(args: tuple[Any, ...], answer: Any) -> Any:
    """Operations that change a tensor return that tensor, not a new one."""
    return args[0] if isinstance(answer, Tensor) else answer


def move_to_paper(module: nn.Module) -> nn.Module:
    """The module with its weights on the paper device; changed in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(PaperTensor(parameter.data), False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = PaperTensor(buffer)
    return module
