"""Pictures to latents and back with a checkpoint's VAE, whatever dtype it lives in.

The VAE stays in the dtype it was loaded in (`parts.vae_dtype`). A result that cannot be right
is computed once more in float32 before it counts as a failure, on the way in as on the way out.
Whether it can be right is a tensor of the device, for which nobody has to wait at once.
"""

import copy
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from models.errors import ModelUnavailable, UnusablePicture


class LatentCodec:
    """A VAE with the scaling its UNet was trained on.

    dtype: of the UNet, in which latents are handed over and taken.
    Raises: ModelUnavailable for a VAE whose latents are also shifted, as Playground v2.5's.
    """

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        for name in ("latents_mean", "latents_std", "shift_factor"):
            if getattr(vae.config, name, None) is not None:
                raise ModelUnavailable(f"a VAE with {name} is not supported")
        self._vae = vae
        self._dtype = dtype
        self.scale: int = 2 ** (len(vae.config.block_out_channels) - 1)
        """Picture pixels per latent pixel, along each side."""

    def encode(self, images: Tensor) -> tuple[list[Any], Tensor]:
        """For each image the VAE's distribution over latents, and whether it is usable, `(n,)`.

        images: `(n, 3, h, w)` float32 in [-1, 1]. `draw` takes a sample of a distribution.
        """
        moments = self._encode_with(self._vae, images)
        return distributions(moments), is_finite(moments)

    def encode_again(self, images: Tensor) -> list[Any]:
        """In float32, what `encode` found unusable. Waits. Raises: UnusablePicture."""
        if self._vae.dtype != torch.float32:
            moments = self._encode_with(self._exact_vae(), images)
            if is_finite(moments).all():
                return distributions(moments)
        raise UnusablePicture("the encoder returned values that are not finite")

    def draw(self, distribution: Any, generator: torch.Generator) -> Tensor:
        """Scaled latents `(n, 4, h/8, w/8)`."""
        return self._scaled(distribution.sample(generator))

    def middle(self, distribution: Any) -> Tensor:
        """The most probable latents, scaled: nothing is drawn for them."""
        return self._scaled(distribution.mode())

    def _scaled(self, latents: Tensor) -> Tensor:
        # Cast first, as `StableDiffusionXLInpaintPipeline._encode_vae_image` does.
        scaled: Tensor = self._vae.config.scaling_factor * latents.to(self._dtype)
        return scaled

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures `(n, 3, h, w)` around [-1, 1], and for each whether it is usable, `(n,)`.

        latents: `(n, 4, h/8, w/8)`.
        """
        pictures = self._decode_with(self._vae, latents)
        return pictures, is_finite(latents) & ~is_unusable(pictures, latents)

    def decode_again(self, latents: Tensor) -> Tensor:
        """In float32, what `decode` found unusable. Waits. Raises: UnusablePicture."""
        if not is_finite(latents).all():
            raise UnusablePicture("the latents hold values that are not finite")
        if self._vae.dtype != torch.float32:
            pictures = self._decode_with(self._exact_vae(), latents)
            if not is_unusable(pictures, latents).any():
                return pictures
        raise UnusablePicture("the decoder returned values that are constant or not finite")

    def _exact_vae(self) -> Any:
        """A float32 copy that lives for one call: it is rare, and the memory is not."""
        return copy.deepcopy(self._vae).float()

    def _encode_with(self, vae: Any, images: Tensor) -> Tensor:
        """The distributions' means and log variances, `(n, 8, h/8, w/8)`."""
        moments: Tensor = vae.encode(images.to(vae.dtype)).latent_dist.parameters
        return moments

    def _decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        pictures: Tensor = vae.decode(
            latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False
        )[0]
        return pictures


def distributions(moments: Tensor) -> list[Any]:
    """One for each row of means and log variances."""
    return [DiagonalGaussianDistribution(each) for each in torch.split(moments, 1)]


def is_unusable(pictures: Tensor, latents: Tensor) -> Tensor:
    """`(n,)`: not finite, or one colour although the latents are not. Before any clamping.

    pictures: `(n, 3, h, w)`; latents: `(n, 4, h/8, w/8)`.
    """
    return ~is_finite(pictures) | (is_constant(pictures) & ~is_constant(latents))


def is_finite(tensors: Tensor) -> Tensor:
    """`(n,)`: no NaN and no infinity in `(n, c, h, w)`."""
    return torch.isfinite(tensors).flatten(1).all(dim=1)


def is_constant(tensors: Tensor) -> Tensor:
    """`(n,)`: every channel of `(n, c, h, w)` holds one value only."""
    lowest, highest = tensors.flatten(2).aminmax(dim=2)  # (n, c)
    return (lowest == highest).all(dim=1)
