"""Prompts to what a family's UNet is conditioned on: the one place where families differ.

Stable Diffusion 1 and 2 have one text encoder; SDXL has two, whose states stand side by side, a
pooled embedding of the whole prompt, and numbers that describe the picture's size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from models.acceleration.transfers import upload
from models.checkpoints.registry import Components
from models.diffusion.prompts import Layer, PromptEncoder, PromptKey
from models.errors import ModelUnavailable
from models.params import InpaintParams

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""diffusers' defaults, for the checkpoints that ask for a score instead of a target size."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Rows are [negative, positive], or [positive] alone where guidance is off.

    prompt_embeds: `(rows, 77 * chunks, d)`.
    added: SDXL's `text_embeds` `(rows, d)` and `time_ids` `(rows, 6)`; empty for other families.
    """

    prompt_embeds: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)


class TextConditioner(Protocol):
    """What the pipeline asks of a family."""

    def remember(self, jobs: Iterable[InpaintParams]) -> None:
        """Encode the texts of several jobs together, for the `encode` of each.

        Raises: InvalidInput.
        """
        ...

    def encode(self, params: InpaintParams, height: int, width: int) -> Conditioning:
        """The conditioning of a job whose pictures have this many pixels.

        Raises: InvalidInput.
        """
        ...


class ClipConditioner:
    """Stable Diffusion 1 and 2."""

    def __init__(self, prompts: PromptEncoder) -> None:
        self._prompts = prompts

    def remember(self, jobs: Iterable[InpaintParams]) -> None:
        self._prompts.remember([key for params in jobs for key in prompt_keys(params)])

    def encode(self, params: InpaintParams, height: int, width: int) -> Conditioning:
        if params.guidance_scale <= 1:
            return Conditioning(self._prompts.encode(params.prompt, params.clip_skip))
        positive, negative = self._prompts.encode_pair(
            params.prompt, params.negative_prompt, params.clip_skip
        )
        return Conditioning(torch.cat([negative, positive]))


class DualClipConditioner:
    """SDXL; agrees with `StableDiffusionXLInpaintPipeline.encode_prompt` and `_get_add_time_ids`.

    prompts: both encoders; the second one also pools, over the first chunk as in A1111.
    has_zero_negative: an empty negative prompt stands for zeros, not for an encoded empty text.
    has_aesthetic_score: the checkpoint was trained on scores in place of the target size.
    """

    def __init__(
        self,
        prompts: Sequence[PromptEncoder],
        *,
        has_zero_negative: bool,
        has_aesthetic_score: bool,
    ) -> None:
        self._prompts = prompts
        self._has_zero_negative = has_zero_negative
        self._has_aesthetic_score = has_aesthetic_score

    def remember(self, jobs: Iterable[InpaintParams]) -> None:
        keys = [key for params in jobs for key in prompt_keys(params)]
        for encoder in self._prompts:
            encoder.remember(keys)

    def encode(self, params: InpaintParams, height: int, width: int) -> Conditioning:
        if params.guidance_scale <= 1:
            states = self._states(params.prompt, params.clip_skip)
            pooled = self._pooled(params, "prompt")
        else:
            states, pooled = self._guided(params)
        time_ids = self._time_ids(height, width)[-len(states) :].to(states.dtype)
        return Conditioning(
            states, {"text_embeds": pooled, "time_ids": upload(time_ids, states.device)}
        )

    def _guided(self, params: InpaintParams) -> tuple[Tensor, Tensor]:
        """States `(2, n, d)` and pooled embeddings `(2, d)`, [negative, positive]."""
        clip_skip = params.clip_skip
        if self._has_zero_negative and not params.negative_prompt:
            positive = self._states(params.prompt, clip_skip)
            pooled = self._pooled(params, "prompt")
            return with_zeros_before(positive), with_zeros_before(pooled)
        pairs = [
            encoder.encode_pair(params.prompt, params.negative_prompt, clip_skip)
            for encoder in self._prompts
        ]
        positive, negative = (side_by_side(states) for states in zip(*pairs, strict=True))
        rows = [self._pooled(params, field) for field in ("negative_prompt", "prompt")]
        return torch.cat([negative, positive]), torch.cat(rows)

    def _states(self, text: str, clip_skip: int) -> Tensor:
        return side_by_side([encoder.encode(text, clip_skip) for encoder in self._prompts])

    def _pooled(self, params: InpaintParams, field: str) -> Tensor:
        return self._prompts[-1].pool(getattr(params, field), params.clip_skip, field=field)

    def _time_ids(self, height: int, width: int) -> Tensor:
        """`(2, 5 or 6)`, [negative, positive]: original size, crop corner, target size or score."""
        size_and_corner = [height, width, 0, 0]
        if self._has_aesthetic_score:
            scores = (NEGATIVE_AESTHETIC_SCORE, AESTHETIC_SCORE)
            return torch.tensor([[*size_and_corner, score] for score in scores])
        return torch.tensor([[*size_and_corner, height, width]] * 2)


def create_conditioner(
    components: Components, device: torch.device, dtype: torch.dtype
) -> TextConditioner:
    """The conditioner of a checkpoint's family. Raises: ModelUnavailable."""
    check_conditions(components)
    if components.text_encoder_2 is None:
        return ClipConditioner(
            PromptEncoder(components.tokenizer, components.text_encoder, device, dtype)
        )
    pairs = (
        (components.tokenizer, components.text_encoder),
        (components.tokenizer_2, components.text_encoder_2),
    )
    return DualClipConditioner(
        [PromptEncoder(*pair, device, dtype, Layer.PENULTIMATE) for pair in pairs],
        has_zero_negative=components.switches.get("force_zeros_for_empty_prompt", True),
        has_aesthetic_score=components.switches.get("requires_aesthetics_score", False),
    )


def prompt_keys(params: InpaintParams) -> list[PromptKey]:
    """The texts a job needs encoded; of the negative prompt only if there is guidance."""
    texts = [params.prompt]
    if params.guidance_scale > 1:
        texts.append(params.negative_prompt)
    return [PromptKey(text, params.clip_skip) for text in texts]


def check_conditions(components: Components) -> None:
    """The UNet takes what its family is conditioned on, and nothing else.

    Raises: ModelUnavailable.
    """
    config = components.unet.config
    if config.get("time_cond_proj_dim") is not None:
        raise ModelUnavailable("UNets distilled for one guidance scale are not supported")
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise ModelUnavailable(f"UNets with {key} take more than a prompt; not supported")
    if config.get("out_channels") != 4:
        raise ModelUnavailable(f"UNets of {config.get('out_channels')} outputs are not supported")
    expected = None if components.text_encoder_2 is None else "text_time"
    if config.get("addition_embed_type") != expected:
        raise ModelUnavailable(
            f"the UNet's addition_embed_type {config.get('addition_embed_type')!r} does not belong "
            "to the checkpoint's text encoders"
        )
    if expected is not None:
        check_embedding_width(components)


def check_embedding_width(components: Components) -> None:
    """SDXL's added embedding is as wide as the numbers it is made of. Raises: ModelUnavailable."""
    config = components.unet.config
    has_score = components.switches.get("requires_aesthetics_score", False)
    numbers = config["addition_time_embed_dim"] * (5 if has_score else 6)
    width = numbers + components.text_encoder_2.config.projection_dim
    if width != config["projection_class_embeddings_input_dim"]:
        raise ModelUnavailable(
            f"the UNet takes {config['projection_class_embeddings_input_dim']} added numbers, but "
            f"requires_aesthetics_score = {has_score} in model_index.json makes {width}"
        )


def side_by_side(states: Sequence[Tensor]) -> Tensor:
    """`(1, n, a)` and `(1, n, b)` to `(1, n, a + b)`."""
    return torch.cat(list(states), dim=-1)


def with_zeros_before(positive: Tensor) -> Tensor:
    """A negative row of zeros and the positive one."""
    return torch.cat([torch.zeros_like(positive), positive])
