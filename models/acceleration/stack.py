"""What makes UNet calls fast on a device, put together: `docs/engine.md` says why each part."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from models.acceleration.attention import MeasuredAttention, cuda_timer
from models.acceleration.autoencoder import fits_by_scaling, halve
from models.acceleration.fusion import ALL_FUSIONS, Fusions, fuse
from models.acceleration.graphs import CudaRecorder, GraphedUNet, GraphLimits
from models.acceleration.unet import BatchedUNet, EagerUNet, GatheredUNet, UNetCall


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What is done on a CUDA device; on others calls are plain.

    graph_memory_share: of the device's memory, 0 to 1, that CUDA graphs may hold; 0 makes none.
    measures_attention: each attention call has the kernel that was quickest for its shape.
    fusions: of UNet and VAE.
    halves_vae: with a UNet in float16, a VAE that was kept in float32 for its range is scaled so
        that float16 holds it: SDXL's.
    is_reproducible: nothing that depends on load, on measurements or on the time since the start
        may move the last bits of a picture.
    """

    graph_memory_share: float = 0.1
    measures_attention: bool = True
    fusions: Fusions = ALL_FUSIONS
    halves_vae: bool = True
    is_reproducible: bool = False

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, torch's libraries choose their algorithms as asked for here.

        The setting is the process's, in which other pipelines may ask for something else.
        """
        before = torch.backends.cudnn.deterministic
        # Or the algorithm may depend on how much memory is free for its workspace.
        torch.backends.cudnn.deterministic = self.is_reproducible
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = before


USUAL = Acceleration()


def prepared_vae(vae: Any, unet_dtype: torch.dtype, acceleration: Acceleration = USUAL) -> Any:
    """The VAE as pictures are to be encoded and decoded with it; changed in place."""
    is_kept_wide = vae.dtype == torch.float32 and unet_dtype == torch.float16
    if acceleration.halves_vae and is_kept_wide and fits_by_scaling(vae):
        halve(vae)
    # Convolutions are a fifth quicker with the channels last, on CPUs as on tensor cores.
    vae.to(memory_format=torch.channels_last)
    fuse(vae, acceleration.fusions)
    return vae


def accelerated(unet: Any, acceleration: Acceleration = USUAL) -> BatchedUNet:
    """Calls of a UNet, on the device where its weights are and must stay.

    They are to be made while the acceleration is `in_force`.
    """
    plain = EagerUNet(unet)
    device: torch.device = unet.device
    if device.type != "cuda":
        return GatheredUNet(plain)
    call: UNetCall = plain
    if acceleration.measures_attention and not acceleration.is_reproducible:
        call = MeasuredAttention(call, plain, cuda_timer(device))
    if acceleration.graph_memory_share == 0:
        return GatheredUNet(call)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    limits = GraphLimits(
        max_bytes=int(acceleration.graph_memory_share * total_bytes),
        is_padded=not acceleration.is_reproducible,
    )
    weights = [*unet.parameters(), *unet.buffers()]
    return GraphedUNet(call, weights, CudaRecorder(device), limits)
