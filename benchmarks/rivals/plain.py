"""The plain diffusers pipeline, used as its documentation says."""

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from PIL import Image

from benchmarks.orders import Order
from models.checkpoints.registry import Components

SDXL_PARTS = ("tokenizer_2", "text_encoder_2")


def build_pipeline(components: Components) -> Any:
    """The inpainting pipeline of the checkpoint's family over loaded parts, without a checker."""
    scheduler_class = getattr(diffusers, components.scheduler_config["_class_name"])
    dtype = components.unet.dtype
    parts: dict[str, Any] = {
        "tokenizer": components.tokenizer,
        "text_encoder": components.text_encoder,
        "unet": components.unet,
        # `from_pretrained(dtype=…)` has all parts in one dtype too.
        "vae": components.vae if components.vae.dtype == dtype else components.vae.to(dtype),
        "scheduler": scheduler_class.from_config(components.scheduler_config),
    }
    second = {name: getattr(components, name, None) for name in SDXL_PARTS}
    if all(second.values()):
        pipeline = diffusers.StableDiffusionXLInpaintPipeline(
            **parts, **second, add_watermarker=False
        )
    else:
        pipeline = diffusers.StableDiffusionInpaintPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, orders: Sequence[Order]) -> list[Image.Image]:
    """One call of the pipeline. orders: all of one kind."""
    first = orders[0]
    width, height = first.init_image.size
    output = pipeline(
        prompt=[order.prompt for order in orders],
        negative_prompt=[""] * len(orders),
        image=[order.init_image for order in orders],
        mask_image=[order.mask_image for order in orders],
        width=width,
        height=height,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        strength=first.strength,
        generator=[torch.Generator("cpu").manual_seed(order.seed) for order in orders],
    )
    pictures: list[Image.Image] = output.images
    return pictures
