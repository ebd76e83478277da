"""The kernels of one UNet or VAE call, counted without a GPU: launches, FLOPs, bytes.

A call runs on the meta device, where tensors have shapes and no values. Each operation that would
start a kernel on a CUDA device is noted with what it computes and moves; launches of our own
kernels are noted where Triton would start them, so the list is that of the code as it is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

NO_KERNEL = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty"),
    *("empty_like", "empty_strided", "expand", "new_empty", "permute", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten"),
    *("unsqueeze", "view"),
}
"""Operations that only describe memory anew, or ask for some."""

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch.

    kind: `product`, `convolution`, `attention`, or the name of a pass over memory.
    module: where in the model, as `named_modules` has it.
    flops: 2 per multiply-add. moved_bytes: of all operands and results, each once.
    shape: of a product and a convolution `(m, n, k)`, of attention `(rows, heads, tokens, keys,
        width)`, else of the result.
    """

    kind: str
    module: str
    flops: int
    moved_bytes: int
    shape: tuple[int, ...]


@dataclass(slots=True)
class Scope:
    """The module that is being called, innermost last."""

    names: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        return self.names[-1] if self.names else ""

    @contextmanager
    def followed(self, model: nn.Module) -> Iterator[None]:
        """Inside, calls of the model's modules are followed."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                enter = module.register_forward_pre_hook(self._entering(name))
                leave = module.register_forward_hook(self._leave)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self.names.append(name)

    def _leave(self, *_: Any) -> None:
        self.names.pop()


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the kernels of torch's operations made inside."""

    def __init__(self, kernels: list[Kernel], scope: Scope) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels
        self._scope = scope

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in NO_KERNEL:
            return answer
        if name == "convolution":
            return self._convolution(answer, *args[:3])
        tensors = tensors_of(args, kwargs)
        results = tensors_of(answer)
        if name in PRODUCTS:
            left, right = tensors[-2:]
            m, n, k = left.shape[-2], right.shape[-1], left.shape[-1]
            flops = 2 * left.numel() * n
            self._note("product", flops, [*tensors, *results], (m, n, k))
        else:
            self._note(name, 0, [*tensors, *results], results[0].shape if results else ())
        return answer

    def _convolution(self, answer: Tensor, images: Tensor, weight: Tensor, bias: Any) -> Tensor:
        """cuDNN adds a bias in a pass of its own, and answers in the memory order it was asked."""
        if weight.is_contiguous(memory_format=torch.channels_last):
            answer = torch.empty_like(answer, memory_format=torch.channels_last)
        m, n, k = answer.numel() // weight.shape[0], weight.shape[0], weight[0].numel()
        self._note("convolution", 2 * m * n * k, [images, weight, answer], (m, n, k))
        if bias is not None:
            self._note("convolution's bias", 0, [answer, bias, answer], answer.shape)
        return answer

    def _note(
        self, kind: str, flops: int, operands: Iterable[Tensor], shape: Iterable[int]
    ) -> None:
        moved_bytes = sum(map(bytes_of, operands))
        self._kernels.append(Kernel(kind, self._scope.module, flops, moved_bytes, tuple(shape)))


class Attention(TorchFunctionMode):
    """Notes attention as the one kernel that it is on a CUDA device."""

    def __init__(self, kernels: list[Kernel], scope: Scope) -> None:
        super().__init__()
        self._kernels = kernels
        self._scope = scope

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        rows, heads, tokens, width = query.shape
        keys = key.shape[2]
        flops = 4 * rows * heads * tokens * keys * width
        moved_bytes = sum(map(bytes_of, (query, key, value, query)))
        shape = (rows, heads, tokens, keys, width)
        self._kernels.append(Kernel("attention", self._scope.module, flops, moved_bytes, shape))
        # As the quick kernels leave it: token by token, with the heads side by side.
        return query.new_empty(rows, tokens, heads, width).transpose(1, 2)


@contextmanager
def noted_launches(kernels: list[Kernel], scope: Scope) -> Iterator[None]:
    """Inside, Triton's kernels are noted and not started."""
    from triton.runtime.jit import JITFunction

    def note(launched: Any, *args: Any, **_options: Any) -> None:
        tensors = {id(each): each for each in args if isinstance(each, Tensor)}
        moved_bytes = sum(map(bytes_of, tensors.values()))
        kind = launched.fn.__name__.strip("_")
        shape = tuple(args[0].shape)
        kernels.append(Kernel(kind, scope.module, 0, moved_bytes, shape))

    start = JITFunction.run
    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = start


def kernels_of(model: nn.Module, call: Callable[[], object]) -> list[Kernel]:
    """The kernels of a call, in order. model: on the meta device; call: calls it."""
    kernels: list[Kernel] = []
    scope = Scope()
    with (
        torch.no_grad(),
        scope.followed(model),
        noted_launches(kernels, scope),
        Attention(kernels, scope),
        Operations(kernels, scope),
    ):
        call()
    return kernels


def tensors_of(*trees: Any) -> list[Tensor]:
    """All tensors in any structures."""
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def bytes_of(tensor: Tensor) -> int:
    """Of its numbers; memory that it only strides over does not count."""
    return tensor.numel() * tensor.element_size()
