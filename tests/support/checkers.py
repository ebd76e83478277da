"""Safety checkers with random weights, and pictures that they tell apart."""

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPImageProcessor

SIDE = 32
"""Of the pictures that a checker looks at."""


def tiny_checker(seed: int) -> StableDiffusionSafetyChecker:
    """A random vision tower with random concepts."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    ).eval()
    # Without larger weights all pictures look the same to a random tower.
    torch.nn.init.normal_(checker.visual_projection.weight)
    torch.nn.init.normal_(checker.vision_model.embeddings.patch_embedding.weight, std=0.2)
    torch.nn.init.normal_(checker.concept_embeds)
    torch.nn.init.normal_(checker.special_care_embeds)
    return checker


def processor() -> CLIPImageProcessor:
    """Brings pictures of any size to what the checker looks at."""
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)


def random_pictures(seed: int, count: int) -> list[NDArray[np.uint8]]:
    """Flat colours with noise, so that they differ in more than detail."""
    rng = np.random.default_rng(seed)
    flat = rng.integers(0, 256, (count, 1, 1, 3))
    noisy = flat + rng.normal(0, 40, (count, SIDE, SIDE, 3))
    return [*np.clip(noisy, 0, 255).astype(np.uint8)]


def cosines(
    checker: StableDiffusionSafetyChecker, pictures: list[NDArray[np.uint8]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(n, 17)` and `(n, 3)`: to the concepts, to the special-care concepts."""
    with torch.inference_mode():
        pixels = processor()(pictures, return_tensors="pt")["pixel_values"]
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
    unit = torch.nn.functional.normalize(embeds, dim=-1)
    concepts, special = (
        torch.nn.functional.normalize(each.detach(), dim=-1)
        for each in (checker.concept_embeds, checker.special_care_embeds)
    )
    return unit @ concepts.T, unit @ special.T
