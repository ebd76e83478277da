"""Decoder results that cannot be right: decoded again in float32, then failed, never returned."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models.errors import ModelUnavailable, UnusablePicture
from models.params import InpaintParams
from models.pipeline import InpaintPipeline, Source
from models.registry import Components
from models.vae import LatentCodec

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(2, 4, 8, 8, generator=GENERATOR)


def small_vae(**config: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        **config,
    ).eval()


def overflowing(vae: Any) -> Any:
    """A VAE whose values leave float16 in the decoder and come back: as SDXL's do."""
    decoder = vae.decoder
    with torch.no_grad():
        decoder.conv_in.weight *= 3e4
        decoder.conv_in.bias *= 3e4
    return vae


def flat(vae: Any, bias: float = 0.3) -> Any:
    """A VAE that paints everything in one grey."""
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(bias)
    return vae


@torch.inference_mode()
def decode(vae: Any, latents: torch.Tensor = LATENTS) -> tuple[torch.Tensor, list[bool]]:
    dtype = vae.dtype
    return LatentCodec(vae, dtype).decode(latents.to(dtype))


def test_usable_pictures_are_decoded_once() -> None:
    vae = small_vae()
    pictures, decoded_again = decode(vae)

    assert decoded_again == [False, False]
    torch.testing.assert_close(pictures, vae.decode(LATENTS / 0.18215).sample)


def test_overflow_is_decoded_again_in_float32() -> None:
    exact = overflowing(small_vae())
    vae = copy.deepcopy(exact).half()
    pictures, decoded_again = decode(vae)

    assert decoded_again == [True, True]
    expected, _ = decode(exact, LATENTS.half().float())
    torch.testing.assert_close(pictures, expected, atol=0.02, rtol=0.02)
    assert vae.dtype == torch.float16


def test_only_the_unusable_picture_is_decoded_again() -> None:
    vae = overflowing(small_vae()).half()
    both = torch.cat([torch.zeros(1, 4, 8, 8), LATENTS[:1]])
    with torch.no_grad():
        vae.decoder.conv_in.bias.zero_()
        vae.post_quant_conv.bias.zero_()
    _, decoded_again = decode(vae, both)

    assert decoded_again == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_constant_picture_of_varied_latents_is_unusable(dtype: torch.dtype) -> None:
    with pytest.raises(UnusablePicture, match="constant"):
        decode(flat(small_vae()).to(dtype))


def test_constant_picture_of_constant_latents_is_a_picture() -> None:
    pictures, decoded_again = decode(flat(small_vae()), torch.ones(1, 4, 8, 8))

    assert decoded_again == [False]
    torch.testing.assert_close(pictures, torch.full_like(pictures, 0.3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_not_decoded(value: float) -> None:
    with pytest.raises(UnusablePicture, match="latents"):
        decode(small_vae(), torch.full((1, 4, 8, 8), value))


def test_values_that_no_dtype_holds_are_unusable() -> None:
    with pytest.raises(UnusablePicture, match="not finite"):
        decode(flat(small_vae(), torch.nan))


def test_picture_tells_of_the_second_decoding(tiny_components: Components) -> None:
    parts = {
        name: copy.deepcopy(getattr(tiny_components, name)).half()
        for name in ("unet", "text_encoder")
    }
    vae = overflowing(copy.deepcopy(tiny_components.vae)).half()
    pipeline = InpaintPipeline(dataclasses.replace(tiny_components, vae=vae, **parts))
    rng = np.random.default_rng(0)
    source = Source(
        rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), np.full((64, 64), 255, np.uint8)
    )
    params = InpaintParams(
        prompt="a", seed=1, width=64, height=64, num_inference_steps=1, strength=1.0
    )
    (sample,) = pipeline.prepare(params, source)
    while not sample.is_denoised:
        pipeline.advance(sample, pipeline.denoise_step([sample])[0])
    (picture,) = pipeline.decode([sample])

    assert picture.is_decoded_again
    assert picture.generated.std() > 1


@pytest.mark.parametrize(
    "config", [{"latents_mean": [0.0] * 4}, {"latents_std": [1.0] * 4}, {"shift_factor": 0.1}]
)
def test_shifted_latents_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelUnavailable, match=next(iter(config))):
        LatentCodec(small_vae(**config), torch.float32)
