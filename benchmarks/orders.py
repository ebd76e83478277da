"""The pictures that are asked for: the same orders for every side of a comparison."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from models.diffusion.pipeline import Source
from models.params import InpaintParams

EXAMPLES = Path(__file__).parents[1] / "models" / "builtin" / "examples"
PROMPTS = ("a red circle", "a blue star", "a green square", "a yellow triangle")
GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class Order:
    """One picture to be made. init_image: RGB; mask_image: L, white is repainted."""

    prompt: str
    num_inference_steps: int
    seed: int
    init_image: Image.Image = field(repr=False)
    mask_image: Image.Image = field(repr=False)
    guidance_scale: float = GUIDANCE_SCALE
    strength: float = 1.0

    @property
    def kind(self) -> tuple[object, ...]:
        """What one call of a plain pipeline must have in common."""
        size = self.init_image.size
        return size, self.num_inference_steps, self.guidance_scale, self.strength

    def params(self) -> InpaintParams:
        """The order as our engine takes it."""
        width, height = self.init_image.size
        return InpaintParams(
            prompt=self.prompt,
            seed=self.seed,
            width=width,
            height=height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            strength=self.strength,
            safety_check=False,
        )

    def source(self) -> Source:
        """Its pictures as our engine takes them."""
        return Source(np.array(self.init_image), np.array(self.mask_image))


def example_image(side_px: int, seed: int) -> Image.Image:
    """A square picture, shifted in a circle by the seed: each is another to a cache."""
    whole = Image.open(EXAMPLES / "clouds.png").convert("RGB").resize((side_px, side_px))
    down, right = divmod(seed, side_px)
    return Image.fromarray(np.roll(np.asarray(whole), (down, right), axis=(0, 1)))


def example_mask(side_px: int) -> Image.Image:
    """A square mask, white in the middle."""
    return Image.open(EXAMPLES / "clouds_mask.png").convert("L").resize((side_px, side_px))


def mixed_steps(steps: Sequence[int], count: int, seed: int) -> list[int]:
    """Step counts in equal shares, in an order that the seed decides."""
    mixed = [steps[index % len(steps)] for index in range(count)]
    random.Random(seed).shuffle(mixed)
    return mixed


def make_orders(side_px: int, step_counts: Sequence[int], seed: int) -> list[Order]:
    """Orders with pictures, prompts and seeds of their own: nobody gains by remembering."""
    mask_image = example_mask(side_px)
    return [
        Order(make_prompt(each), steps, each, example_image(side_px, each), mask_image)
        for each, steps in enumerate(step_counts, start=seed)
    ]


def make_prompt(seed: int) -> str:
    """Another text for each seed."""
    return f"{PROMPTS[seed % len(PROMPTS)]}, picture {seed}"
