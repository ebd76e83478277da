"""Random rows of UNet calls, and a recorder of such calls that needs no GPU."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.acceleration.unet import UNetCall, UNetInputs, UNetRows
from models.checkpoints.registry import Components


@dataclass(slots=True)
class HostRecording:
    """Makes the call again, from the inputs it was recorded with into the result's memory."""

    call: UNetCall
    inputs: UNetInputs
    output: Tensor
    held_bytes: int
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.call(self.inputs))


@dataclass(slots=True)
class HostRecorder:
    """faults: what recording a call of so many rows raises. bytes_per_row: what it then holds."""

    faults: dict[int, Exception] = field(default_factory=dict)
    bytes_per_row: int = 1
    recordings: list[HostRecording] = field(default_factory=list)
    pools: list[Any] = field(default_factory=list)
    attempts: int = 0

    def new_pool(self) -> object:
        return object()

    def warm_up(self, call: UNetCall, inputs: UNetInputs) -> None:
        call(inputs)

    def record(self, call: UNetCall, inputs: UNetInputs, pool: Any) -> HostRecording:
        self.attempts += 1
        if inputs.rows in self.faults:
            raise self.faults[inputs.rows]
        output = call(inputs)
        self.pools.append(pool)
        self.recordings.append(
            HostRecording(call, inputs, output, self.bytes_per_row * inputs.rows)
        )
        return self.recordings[-1]

    @property
    def rows(self) -> list[int]:
        """Of all recordings that were ever made, in order."""
        return [recording.inputs.rows for recording in self.recordings]


def make_shares(
    components: Components, row_counts: list[int], height: int = 8, seed: int = 0
) -> list[UNetRows]:
    """Random rows of a picture of this latent height; every sample has a timestep of its own."""
    config = components.unet.config
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    is_sdxl = components.text_encoder_2 is not None
    return [
        UNetRows(
            numbers(rows, 9, height, 8),
            999.0 - 7 * place,
            numbers(rows, 77, config.cross_attention_dim),
            {"text_embeds": numbers(rows, 20), "time_ids": numbers(rows, 6)} if is_sdxl else {},
        )
        for place, rows in enumerate(row_counts)
    ]
