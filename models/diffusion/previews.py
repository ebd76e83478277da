"""What latents look like, and what they will be, without a UNet or VAE call: for previews.

How a preview comes into its picture is the canvas's business, when one is made the worker's.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from numpy.typing import NDArray
from PIL.Image import Resampling

from models.imaging.images import resize

Colours: TypeAlias = NDArray[np.float64]
"""`(5, 3)`: RGB, 0 to 255, of each latent channel's unit, and in the last row of latents of 0."""

CALIBRATION_SIDE = 512
CALIBRATION_CELLS = 8
"""The calibration picture has so many random colours along each side, and what lies between: of the
finer and coarser ones tried it is the nearest to the built-in model's pictures."""


def estimate_clean(
    scheduler: SchedulerMixin,
    timestep: float,
    model_input: torch.Tensor,
    prediction: torch.Tensor,
) -> torch.Tensor:
    """The latents that a run would end with if its last prediction were right, `(1, 4, h/8, w/8)`.

    model_input: what the UNet was given, in variance-preserving scale: `scale_model_input` brings
        the latents of every scheduler to it. prediction: what it answered, after guidance.
    Of noise it is equation 12 of Song et al. 2021 (arXiv 2010.02502), of velocity appendix D of
    Salimans and Ho 2022 (arXiv 2202.00512), both as in diffusers' `DDIMScheduler.step`. Neither
    depends on how a scheduler steps, so inner steps of second-order ones need nothing of their own.
    """
    kept = signal_share(scheduler.alphas_cumprod, timestep)
    model_input, prediction = model_input.float(), prediction.float()
    signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
    match scheduler.config.prediction_type:
        case "v_prediction":
            return signal * model_input - noise * prediction
        case "sample":
            return prediction
        case _:
            return (model_input - noise * prediction) / signal


def signal_share(alphas_cumprod: torch.Tensor, timestep: float) -> float:
    """alphas_cumprod at a timestep, which second-order schedulers may choose between two."""
    below = int(timestep)
    above = min(below + 1, len(alphas_cumprod) - 1)
    return float(alphas_cumprod[below].lerp(alphas_cumprod[above], timestep - below))


def fit_colours(encode: Callable[[NDArray[np.uint8]], torch.Tensor]) -> Colours:
    """The linear map from latents to colours that suits a VAE best, by least squares.

    encode: from `(h, w, 3)` uint8 to latents `(1, 4, h/8, w/8)`.
    That a linear map does was found for Stable Diffusion 1.4
    (discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204); others publish a
    table for each family, which this makes out of the checkpoint at hand.
    """
    picture = calibration_picture()
    latents = with_ones(encode(picture))
    small = resize(picture, latents.shape[1], latents.shape[0], Resampling.BOX)
    inputs, colours = latents.reshape(-1, latents.shape[2]), small.reshape(-1, 3)
    return np.linalg.lstsq(inputs, colours.astype(np.float64))[0].astype(np.float64)


def paint(latents: torch.Tensor, colours: Colours) -> NDArray[np.uint8]:
    """Latents `(1, 4, h/8, w/8)` as a picture `(h/8, w/8, 3)`; what is not finite is black."""
    painted = np.nan_to_num(with_ones(latents) @ colours, nan=0, posinf=0, neginf=0)
    return painted.clip(0, 255).round().astype(np.uint8)


def calibration_picture() -> NDArray[np.uint8]:
    """Random colours that run into one another, the same each time."""
    shape = (CALIBRATION_CELLS, CALIBRATION_CELLS, 3)
    cells = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return resize(cells, CALIBRATION_SIDE, CALIBRATION_SIDE, Resampling.BICUBIC)


def with_ones(latents: torch.Tensor) -> NDArray[np.float64]:
    """Latents `(1, 4, h/8, w/8)` as `(h/8, w/8, 5)`, the last being 1."""
    channels = latents[0].permute(1, 2, 0).cpu().double().numpy()
    return np.concatenate([channels, np.ones_like(channels[..., :1])], axis=2)
