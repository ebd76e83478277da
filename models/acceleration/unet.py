"""One UNet call for the rows of many samples: what goes in, and the plain way to make it.

Other ways are in `graphs` and `attention`; each takes a `UNetCall` and is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from models.acceleration.transfers import upload


@dataclass(frozen=True, slots=True)
class UNetRows:
    """A sample's share of a call: 2 rows with guidance, else 1.

    latents: `(rows, 4 or 9, h/8, w/8)`. timestep: a number of the host, the same for all its rows.
    conditioning: `(rows, tokens, d)`. added: `(rows, …)` each, empty but for SDXL.
    """

    latents: Tensor
    timestep: float
    conditioning: Tensor
    added: dict[str, Tensor]

    @property
    def rows(self) -> int:
        return self.conditioning.shape[0]


@dataclass(frozen=True, slots=True)
class CallSize:
    """Shape of a call apart from its number of rows.

    added: widths by name, in order.
    """

    height: int
    width: int
    tokens: int
    added: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, share: "UNetRows | UNetInputs") -> "CallSize":
        """The size of the calls that this share may join."""
        added = tuple((name, each.shape[1]) for name, each in share.added.items())
        height, width = share.latents.shape[-2:]
        return cls(height, width, share.conditioning.shape[1], added)

    @property
    def area(self) -> int:
        """Latent pixels of a row."""
        return self.height * self.width


@dataclass(frozen=True, slots=True)
class UNetInputs:
    """The arguments of a call, on the device; the fields of `UNetRows` for all rows.

    timesteps: `(rows,)` float32; some schedulers' are fractional.
    """

    latents: Tensor
    timesteps: Tensor
    conditioning: Tensor
    added: dict[str, Tensor]

    @classmethod
    def gather(cls, shares: Sequence[UNetRows]) -> "UNetInputs":
        """The rows of all shares, one after the other."""
        latents = torch.cat([share.latents for share in shares])
        return cls(
            # Whose memory the rows had decides its order, and kernels are chosen for an order.
            latents.contiguous(),
            upload(host_timesteps(shares), latents.device),
            torch.cat([share.conditioning for share in shares]),
            {name: torch.cat([each.added[name] for each in shares]) for name in shares[0].added},
        )

    @classmethod
    def room_for(cls, rows: int, share: UNetRows) -> "UNetInputs":
        """Zeros for a call of so many rows like those of the share; `fill` writes into them."""
        latents, conditioning = share.latents, share.conditioning
        return cls(
            latents.new_zeros(rows, *latents.shape[1:]),
            torch.zeros(rows, device=latents.device),
            conditioning.new_zeros(rows, *conditioning.shape[1:]),
            {name: each.new_zeros(rows, *each.shape[1:]) for name, each in share.added.items()},
        )

    def fill(self, shares: Sequence[UNetRows]) -> None:
        """Write the rows of all shares, in place, from the first row on; the others stay."""
        rows = sum(share.rows for share in shares)
        torch.cat([share.latents for share in shares], out=self.latents[:rows])
        self.timesteps[:rows].copy_(upload(host_timesteps(shares), self.timesteps.device))
        torch.cat([share.conditioning for share in shares], out=self.conditioning[:rows])
        for name, room in self.added.items():
            torch.cat([share.added[name] for share in shares], out=room[:rows])

    @property
    def rows(self) -> int:
        return self.latents.shape[0]


def host_timesteps(shares: Sequence[UNetRows]) -> Tensor:
    """`(rows,)` float32 on the host."""
    return torch.tensor([share.timestep for share in shares for _ in range(share.rows)])


class UNetCall(Protocol):
    """A way to make a call."""

    def __call__(self, inputs: UNetInputs) -> Tensor:
        """Predictions `(rows, 4, h/8, w/8)`."""
        ...


@dataclass(frozen=True, slots=True)
class EagerUNet:
    """Kernel by kernel, as diffusers does it."""

    unet: Any

    def __call__(self, inputs: UNetInputs) -> Tensor:
        added = {"added_cond_kwargs": inputs.added} if inputs.added else {}
        prediction: Tensor = self.unet(
            inputs.latents,
            inputs.timesteps,
            encoder_hidden_states=inputs.conditioning,
            return_dict=False,
            **added,
        )[0]
        return prediction


class BatchedUNet(Protocol):
    """One UNet call for the shares of several samples."""

    def __call__(self, shares: Sequence[UNetRows]) -> Tensor:
        """Predictions `(rows, 4, h/8, w/8)`, the caller's own.

        shares: of one `CallSize`.
        """
        ...

    def recorded_rows(self, area: int) -> list[int]:
        """The numbers of rows whose first call is slow, for rows of `area` latent pixels."""
        ...

    def release(self) -> None:
        """Release the memory that is held between calls."""
        ...


@dataclass(frozen=True, slots=True)
class GatheredUNet:
    """Every call with exactly the rows there are."""

    call: UNetCall

    def __call__(self, shares: Sequence[UNetRows]) -> Tensor:
        return self.call(UNetInputs.gather(shares))

    def recorded_rows(self, area: int) -> list[int]:
        return []

    def release(self) -> None:
        """Nothing is held."""
