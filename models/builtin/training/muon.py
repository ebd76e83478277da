"""The optimizer for weight matrices: momentum, then an update whose singular values are all near 1.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the
scale that makes its steps as large as AdamW's is from J. Liu et al., "Muon is Scalable for LLM
Training" (2025), section 2.2. torch's own Muon takes no convolution kernels.
"""

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
_ITERATIONS = 5
_ADAM_SCALE = 0.2  # root mean square of a typical AdamW step, in units of the learning rate

_OUTER = ("conv_in", "conv_out", "time_embedding")


class Muon(torch.optim.Optimizer):
    """For tensors of two or more axes; kernels `(out, in, h, w)` count as `(out, in * h * w)`.

    `rank` of `count` processes, which hold equal gradients, does its part of the matrices and
    gets the rest from the others.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, rank: int, count: int) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})
        self.rank, self.count = rank, count

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        moving = [p for p in group["params"] if p.grad is not None]
        aheads = [self._ahead(parameter, group["momentum"]) for parameter in moving]
        flat = torch.cat([ahead.flatten() for ahead in aheads])
        offset = 0
        for index, ahead in enumerate(aheads):
            place = flat[offset : offset + ahead.numel()]
            offset += ahead.numel()
            if index % self.count == self.rank:
                place.copy_(orthogonalise(ahead.flatten(1)).flatten())
            else:
                place.zero_()
        if self.count > 1:
            distributed.all_reduce(flat)
        offset = 0
        for parameter in moving:
            update = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            scale = _ADAM_SCALE * max(parameter.flatten(1).shape) ** 0.5
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * scale)

    def _ahead(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient after Nesterov momentum."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        velocity: Tensor = state["momentum"].lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(velocity, momentum)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix `(m, n)` with its singular values replaced by numbers near 1."""
    first, second, third = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = first * x + (second * gram + third * gram @ gram) @ x
    result: Tensor = x.T if is_tall else x
    return result


class Optimizers:
    """Muon for the inner weight matrices, AdamW for the outer layers and everything small."""

    def __init__(self, module: nn.Module, learning_rate: float, rank: int, count: int) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            is_inner = parameter.ndim >= 2 and not name.startswith(_OUTER)
            (matrices if is_inner else others).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, learning_rate, rank, count),
            torch.optim.AdamW(others, learning_rate, (0.9, 0.98), weight_decay=0.01),
        ]

    def step(self, learning_rate: float) -> None:
        for part in self.parts:
            part.param_groups[0]["lr"] = learning_rate
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
