"""NSFW check of finished pictures."""

from typing import Protocol

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray

from models.acceleration.transfers import upload

SPECIAL_CARE_MARGIN = 0.01
"""Added to every concept's score once a special-care concept is present."""

SCORE_RESOLUTION = 0.0005
"""diffusers rounds scores to three digits before comparing with 0; this is the same threshold."""


class ImageProcessor(Protocol):
    """What we use of transformers' CLIPImageProcessor."""

    def __call__(
        self, images: list[NDArray[np.uint8]], return_tensors: str
    ) -> dict[str, torch.Tensor]: ...


class SafetyChecker:
    """Judges pictures with a checkpoint's own StableDiffusionSafetyChecker.

    Gives the same verdicts as its `forward`, in two halves: `pixels_of` is work of the host, and
    `verdicts` queues the device's, without a transfer from it (the original reads every score
    singly and blanks in place).
    """

    def __init__(
        self, checker: StableDiffusionSafetyChecker, image_processor: ImageProcessor
    ) -> None:
        self._checker = checker
        self._image_processor = image_processor

    def is_flagged(self, images: list[NDArray[np.uint8]]) -> list[bool]:
        """One verdict per picture; images: `(h, w, 3)` RGB each. Waits."""
        verdicts: list[bool] = self.verdicts(self.pixels_of(images)).tolist()
        return verdicts

    def pixels_of(self, images: list[NDArray[np.uint8]]) -> torch.Tensor:
        """What the checker looks at, `(n, 3, 224, 224)` on the host; images as `is_flagged`."""
        return self._image_processor(images, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def verdicts(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(n,)` bool on the device: True for what is flagged. pixels: of `pixels_of`."""
        checker = self._checker
        weight = checker.visual_projection.weight
        pooled = checker.vision_model(upload(pixels, weight.device).to(weight.dtype))[1]
        embeds = checker.visual_projection(pooled)  # (n, d)
        special = cosine_similarity(embeds, checker.special_care_embeds)  # (n, 3)
        concept = cosine_similarity(embeds, checker.concept_embeds)  # (n, 17)
        needs_care = (special - checker.special_care_embeds_weights > SCORE_RESOLUTION).any(dim=1)
        margin = needs_care.float()[:, None] * SPECIAL_CARE_MARGIN
        scores = concept - checker.concept_embeds_weights + margin
        flagged: torch.Tensor = (scores > SCORE_RESOLUTION).any(dim=1)
        return flagged


def cosine_similarity(embeds: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    """embeds: `(n, d)`; concepts: `(m, d)`; result `(n, m)`, float32 in [-1, 1]."""
    unit = torch.nn.functional.normalize
    return unit(embeds.float()) @ unit(concepts.float()).T
