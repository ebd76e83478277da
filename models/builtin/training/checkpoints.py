"""Resumable training: one file per stage with weights, optimizer state and the step reached."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training stage; written to a neighbour first, so never half there."""

    path: Path

    def load(self) -> dict[str, Any] | None:
        """The saved state on CPU, or nothing if the stage has not begun."""
        if not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return state

    def save(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)


class Average:
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, parameter in module.named_parameters():
            self.values[name].lerp_(parameter.detach(), 1.0 - decay)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "values": self.values}

    def restore(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])
        for name, value in state["values"].items():
            self.values[name].copy_(value)
