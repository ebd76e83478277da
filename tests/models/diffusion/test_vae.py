"""Decoder results that cannot be right: decoded again in float32, then failed, never returned."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline, Picture, Source
from models.diffusion.vae import LatentCodec
from models.errors import ModelUnavailable, UnusablePicture
from models.params import InpaintParams

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
    """Pictures, and which of them were decoded again."""
    codec = LatentCodec(vae, vae.dtype)
    latents = latents.to(vae.dtype)
    pictures, is_usable = codec.decode(latents)
    if not is_usable.all():
        pictures = pictures.float()
        pictures[~is_usable] = codec.decode_again(latents[~is_usable])
    return pictures, [not each for each in is_usable.tolist()]


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
    vae = overflowing(copy.deepcopy(tiny_components.vae))
    picture = paint(half_precision(tiny_components, vae), random_source())

    assert picture.is_decoded_again
    assert not picture.is_encoded_again
    assert picture.generated.std() > 1


@pytest.mark.parametrize(
    "config", [{"latents_mean": [0.0] * 4}, {"latents_std": [1.0] * 4}, {"shift_factor": 0.1}]
)
def test_shifted_latents_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelUnavailable, match=next(iter(config))):
        LatentCodec(small_vae(**config), torch.float32)


IMAGES = torch.rand(2, 3, 64, 64, generator=GENERATOR) * 2 - 1


def overflowing_encoder(vae: Any) -> Any:
    """A VAE whose values leave float16 in the encoder and come back."""
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 3e5
        vae.encoder.conv_in.bias *= 3e5
    return vae


@torch.inference_mode()
def encode(vae: Any, images: torch.Tensor = IMAGES) -> tuple[list[torch.Tensor], list[bool]]:
    """The distributions' means, and which of them were encoded again."""
    codec = LatentCodec(vae, vae.dtype)
    found, is_usable = codec.encode(images)
    means = [
        (each if flag else codec.encode_again(image[None])[0]).mean
        for each, flag, image in zip(found, is_usable, images, strict=True)
    ]
    return means, [not each for each in is_usable.tolist()]


def test_usable_latents_are_encoded_once_and_given_singly() -> None:
    vae = small_vae()
    means, encoded_again = encode(vae)

    assert encoded_again == [False, False]
    torch.testing.assert_close(torch.cat(means), vae.encode(IMAGES).latent_dist.mean)


def test_encoder_overflow_is_encoded_again_in_float32() -> None:
    exact = overflowing_encoder(small_vae())
    vae = copy.deepcopy(exact).half()
    means, encoded_again = encode(vae)

    assert encoded_again == [True, True]
    torch.testing.assert_close(means, encode(exact)[0], atol=0.02, rtol=0.02)
    assert vae.dtype == torch.float16


def test_only_the_unusable_image_is_encoded_again() -> None:
    vae = overflowing_encoder(small_vae()).half()
    with torch.no_grad():
        vae.encoder.conv_in.bias.zero_()
    _, encoded_again = encode(vae, torch.cat([torch.zeros(1, 3, 64, 64), IMAGES[:1]]))

    assert encoded_again == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latents_that_no_dtype_holds_are_unusable(dtype: torch.dtype) -> None:
    vae = small_vae().to(dtype)
    with torch.no_grad():
        vae.encoder.conv_out.bias.fill_(torch.nan)

    with pytest.raises(UnusablePicture, match="encoder"):
        encode(vae)


def half_precision(components: Components, vae: Any) -> InpaintPipeline:
    """The components in float16 with another VAE."""
    parts = {
        name: copy.deepcopy(getattr(components, name)).half() for name in ("unet", "text_encoder")
    }
    return InpaintPipeline(dataclasses.replace(components, vae=vae.half(), **parts))


def paint(pipeline: InpaintPipeline, source: Source, **changes: Any) -> Picture:
    height, width = source.mask.shape
    params = InpaintParams(
        prompt="a",
        seed=1,
        width=width,
        height=height,
        num_inference_steps=1,
        **{"strength": 1.0, **changes},
    )
    (sample,) = pipeline.prepare(params, source)
    while not sample.is_denoised:
        pipeline.advance(sample, pipeline.denoise_step([sample])[0])
    return pipeline.decode([sample])[0]


def random_source() -> Source:
    rng = np.random.default_rng(0)
    return Source(
        rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), np.full((64, 64), 255, np.uint8)
    )


def test_picture_tells_of_the_second_encoding_from_the_cache_too(
    tiny_components: Components,
) -> None:
    vae = overflowing_encoder(copy.deepcopy(tiny_components.vae))
    pipeline = half_precision(tiny_components, vae)
    pictures = [paint(pipeline, random_source(), strength=0.7) for _ in range(2)]

    assert [picture.is_encoded_again for picture in pictures] == [True, True]
    assert [picture.is_decoded_again for picture in pictures] == [False, False]
    assert pictures[0].generated.std() > 1
    np.testing.assert_array_equal(pictures[0].image, pictures[1].image)


def test_unusable_latents_are_not_remembered(tiny_components: Components) -> None:
    vae = copy.deepcopy(tiny_components.vae)
    pipeline = InpaintPipeline(dataclasses.replace(tiny_components, vae=vae))
    bias = vae.encoder.conv_out.bias.clone()
    vae.encoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(UnusablePicture):
        paint(pipeline, random_source())
    vae.encoder.conv_out.bias.data.copy_(bias)

    assert paint(pipeline, random_source()).generated.std() > 1


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("is_half", [False, True], ids=["float32", "float16"])
def test_picture_of_one_colour_is_kept(
    tiny_components: Components, level: int, is_half: bool
) -> None:
    source = Source(np.full((64, 64, 3), level, np.uint8), np.zeros((64, 64), np.uint8))
    pipeline = (
        half_precision(tiny_components, copy.deepcopy(tiny_components.vae))
        if is_half
        else InpaintPipeline(tiny_components)
    )

    assert (paint(pipeline, source).image == level).all()
