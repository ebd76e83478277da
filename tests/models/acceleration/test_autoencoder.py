"""VAEs: attention by two products, and residual streams that float16 could not hold."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models.acceleration.autoencoder import (
    QUERIES,
    STREAM_EXPONENT,
    WideAttention,
    fits_by_scaling,
    halve,
    scale_stream,
    widen_attention,
)
from models.acceleration.stack import Acceleration
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import load_components
from models.diffusion.pipeline import InpaintPipeline, Source
from tests.support.pipelines import denoise, make_params
from tests.support.tiny import save_tiny_checkpoint

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(2, 4, 16, 16, generator=GENERATOR)
PICTURES = torch.rand(2, 3, 128, 128, generator=GENERATOR) * 2 - 1
LEAST_DB = 45


def make_vae(**config: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        **config,
    ).eval()


def blown_up(vae: Any) -> Any:
    """A VAE whose residual streams leave float16's range, as those of SDXL's do."""
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".conv2." in name:
                parameter *= 6e4
    return vae


def largest_of_stream(coder: Any, *arguments: torch.Tensor) -> float:
    peaks = [0.0]
    for module in coder.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.register_forward_hook(
                lambda _, __, answer: peaks.append(float(answer.abs().max()))
            )
    coder(*arguments)
    return max(peaks)


def db_between(left: torch.Tensor, right: torch.Tensor) -> float:
    """PSNR, of values that span 2."""
    error = (left.double() - right.double()).square().mean().item()
    return 10 * float(np.log10(4 / max(error, 1e-20)))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.inference_mode()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_wide_attention_is_the_plain_one(memory_format: torch.memory_format) -> None:
    """In parts too: more pixels than are attended to at a time."""
    plain = make_vae().to(memory_format=memory_format)
    wide = copy.deepcopy(plain)
    widen_attention(wide)
    latents = torch.randn(1, 4, 44, 52, generator=GENERATOR)
    assert latents[0, 0].numel() > QUERIES

    assert sum(isinstance(each, WideAttention) for each in wide.modules()) == 2
    expected = plain.decode(latents).sample
    for vae in (wide, copy.deepcopy(wide)):
        assert relative_error(vae.decode(latents).sample, expected) <= 5e-5
    moments = (vae.encode(PICTURES).latent_dist.parameters for vae in (wide, plain))
    assert relative_error(*moments) <= 5e-5


@torch.inference_mode()
def test_wide_attention_in_half_precision_gets_no_worse() -> None:
    exact = make_vae().decoder.mid_block.attentions[0]
    exact.group_norm.weight.fill_(6)  # a few pixels get most of the attention
    plain, wide = copy.deepcopy(exact).half(), copy.deepcopy(exact).half()
    WideAttention.settle(wide)
    hidden = torch.randn(1, 32, 16, 16, generator=GENERATOR).half()
    expected = exact.double()(hidden.double())

    error = relative_error(plain(hidden), expected)
    assert relative_error(wide(hidden), expected) <= 1.1 * error


def test_attention_of_other_kinds_stays() -> None:
    vae = make_vae()
    vae.decoder.mid_block.attentions[0].rescale_output_factor = 2.0
    widen_attention(vae)

    assert not isinstance(vae.decoder.mid_block.attentions[0], WideAttention)


@torch.inference_mode()
def test_scaled_stream_changes_no_digit_in_float32() -> None:
    exact = blown_up(make_vae())
    scaled = copy.deepcopy(exact)
    for coder in (scaled.encoder, scaled.decoder):
        scale_stream(coder, STREAM_EXPONENT)

    assert torch.equal(scaled.decode(LATENTS).sample, exact.decode(LATENTS).sample)
    moments = exact.encode(PICTURES).latent_dist.parameters
    assert torch.equal(scaled.encode(PICTURES).latent_dist.parameters, moments)
    before = largest_of_stream(exact.decoder, LATENTS)
    assert largest_of_stream(scaled.decoder, LATENTS) == before / 2**STREAM_EXPONENT


@torch.inference_mode()
def test_stream_too_large_for_float16_is_decoded_in_it() -> None:
    exact = blown_up(make_vae())
    plain, scaled = copy.deepcopy(exact).half(), halve(copy.deepcopy(exact))
    expected, found = exact.decode(LATENTS).sample, scaled.decode(LATENTS.half()).sample

    assert largest_of_stream(exact.decoder, LATENTS) > 3e5
    assert not plain.decode(LATENTS.half()).sample.isfinite().all()
    assert db_between(found, expected) >= LEAST_DB

    assert not plain.encode(PICTURES.half()).latent_dist.parameters.isfinite().all()
    means = exact.encode(PICTURES).latent_dist.mean
    assert db_between(scaled.encode(PICTURES.half()).latent_dist.mean, means) >= LEAST_DB


def test_unknown_vae_is_not_scaled() -> None:
    assert fits_by_scaling(make_vae())
    vae = make_vae()
    vae.register_to_config(up_block_types=("AttnUpDecoderBlock2D",) * 4)
    assert not fits_by_scaling(vae)


def test_pipeline_halves_the_vae_that_float16_could_not_hold(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "xl", 9, Family.SDXL)
    components = load_components(ModelSpec("xl", str(folder)), torch.device("cpu"), torch.float16)
    assert components.vae.dtype == torch.float32
    blown_up(components.vae)
    exact = dataclasses.replace(components, vae=copy.deepcopy(components.vae))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    source = Source(noise, np.full((64, 64), 255, np.uint8))

    pictures = []
    for parts, is_halved in ((components, True), (exact, False)):
        pipeline = InpaintPipeline(parts, Acceleration(halves_vae=is_halved))
        assert parts.vae.dtype == (torch.float16 if is_halved else torch.float32)
        samples = pipeline.prepare(make_params(num_inference_steps=2, scheduler=None), source)
        denoise(pipeline, samples)
        (picture,) = pipeline.decode(samples)
        assert not picture.is_decoded_again
        assert not picture.is_encoded_again
        pictures.append(torch.from_numpy(picture.generated).double() / 127.5)
    assert db_between(*pictures) >= LEAST_DB
