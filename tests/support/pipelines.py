"""Parameters, pictures and runs of a tiny pipeline, and diffusers' own run of the same."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from numpy.typing import NDArray
from PIL import Image

from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline, Picture, Sample, Source
from models.diffusion.schedulers import create_scheduler
from models.params import InpaintParams, NoiseSpacing, SchedulerName

WIDTH, HEIGHT = 72, 64


def make_params(**changes: Any) -> InpaintParams:
    defaults = {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "seed": 7,
        "width": WIDTH,
        "height": HEIGHT,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "strength": 1.0,
        "scheduler": SchedulerName.DDIM,
    }
    return InpaintParams(**{**defaults, **changes})


def make_source(width: int = WIDTH, height: int = HEIGHT) -> Source:
    """Noise, and a rectangle to repaint that no block of latents is aligned with."""
    rng = np.random.default_rng(0)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 + 3 : -height // 4, width // 8 + 1 : -width // 3] = 255
    return Source(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), mask)


SOURCE = make_source()

MIXED_BATCH = [
    make_params(),
    make_params(seed=10, guidance_end=0.5),
    make_params(seed=8, num_inference_steps=6, scheduler=SchedulerName.EULER),
    make_params(prompt="a green star", scheduler=SchedulerName.EULER_ANCESTRAL),
    make_params(strength=0.6, num_inference_steps=5, scheduler=SchedulerName.PNDM),
    make_params(guidance_scale=1.0, scheduler=SchedulerName.LCM),
    make_params(guidance_scale=9.0, strength=0.5, scheduler=SchedulerName.DPM_MULTISTEP),
    make_params(negative_prompt="", scheduler=SchedulerName.HEUN),
    make_params(clip_skip=1, scheduler=SchedulerName.UNIPC, seed=9),
]


def run(pipeline: InpaintPipeline, params: InpaintParams, source: Source = SOURCE) -> list[Picture]:
    """All pictures of a job, each sample on its own."""
    samples = pipeline.prepare(params, source)
    for sample in samples:
        denoise(pipeline, [sample])
    return [pipeline.decode([sample])[0] for sample in samples]


def denoise(pipeline: InpaintPipeline, samples: Sequence[Sample]) -> None:
    """All samples to their last step, together as long as they have steps left."""
    while rest := [sample for sample in samples if not sample.is_denoised]:
        denoise_once(pipeline, rest)


def denoise_once(pipeline: InpaintPipeline, samples: Sequence[Sample]) -> None:
    """One step of all samples."""
    for sample, prediction in zip(samples, pipeline.denoise_step(samples), strict=True):
        pipeline.advance(sample, prediction)


def generated(
    pipeline: InpaintPipeline, params: InpaintParams, source: Source = SOURCE
) -> NDArray[np.uint8]:
    (picture,) = run(pipeline, params, source)
    return picture.generated


def reference(
    components: Components, params: InpaintParams, source: Source = SOURCE
) -> NDArray[np.uint8]:
    """The picture of diffusers' own pipeline from the same weights."""
    original = original_pipeline(components, params.scheduler, params.noise_spacing)
    return picture_of(original, params, source)


def original_pipeline(
    components: Components, name: SchedulerName | None, spacing: NoiseSpacing | None = None
) -> Any:
    """diffusers' own pipeline around the same weights."""
    shared = {
        "vae": components.vae,
        "text_encoder": components.text_encoder,
        "tokenizer": components.tokenizer,
        "unet": components.unet,
        "scheduler": create_scheduler(name, components.scheduler_config, spacing),
    }
    if components.text_encoder_2 is None:
        return StableDiffusionInpaintPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLInpaintPipeline(
        **shared,
        text_encoder_2=components.text_encoder_2,
        tokenizer_2=components.tokenizer_2,
        add_watermarker=False,
        **components.switches,
    )


def picture_of(original: Any, params: InpaintParams, source: Source = SOURCE) -> NDArray[np.uint8]:
    """A picture of diffusers' own pipeline."""
    original.set_progress_bar_config(disable=True)
    answer = original(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt or None,
        image=Image.fromarray(source.init_image),
        mask_image=Image.fromarray(source.mask),
        width=params.width,
        height=params.height,
        strength=params.strength,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(params.seed),
        clip_skip=params.clip_skip or None,
        output_type="np",
        **end_of_guidance(original, params.guidance_end),
    )
    picture: NDArray[np.uint8] = (answer.images[0] * 255).round().astype(np.uint8)
    return picture


GUIDED = ("prompt_embeds", "mask", "masked_image_latents", "add_text_embeds", "add_time_ids")
"""What diffusers' pipelines hold twice while there is guidance."""


def end_of_guidance(original: Any, share: float) -> dict[str, Any]:
    """Arguments with which diffusers' pipeline ends its guidance, as its `SDCFGCutoffCallback`."""
    names = [name for name in GUIDED if name in original._callback_tensor_inputs]

    def end(pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < share * pipeline.num_timesteps:
            return values
        pipeline._guidance_scale = 1.0
        return {name: value if value is None else value[-1:] for name, value in values.items()}

    if share == 1:
        return {}
    return {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": names}


def difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.abs(first.astype(np.int16) - second.astype(np.int16))


UNetAnswer: TypeAlias = Callable[[Callable[[], torch.Tensor], torch.Tensor], torch.Tensor]
"""Of a UNet: from the real one, ready to be called, and the conditioning `(rows, tokens, d)`."""


class FaultyUNet(torch.nn.Module):
    """The real UNet, but some of its answers are replaced or do not come."""

    def __init__(self, unet: Any, answer: UNetAnswer) -> None:
        super().__init__()
        self.unet = unet
        self.answer = answer
        self.config = unet.config
        self.device = unet.device
        self.dtype = unet.dtype

    def forward(
        self,
        rows: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        def real() -> torch.Tensor:
            answer: torch.Tensor = self.unet(
                rows, timesteps, encoder_hidden_states=encoder_hidden_states, return_dict=False
            )[0]
            return answer

        return (self.answer(real, encoder_hidden_states),)


def with_fault(components: Components, answer: UNetAnswer) -> InpaintPipeline:
    return InpaintPipeline(
        dataclasses.replace(components, unet=FaultyUNet(components.unet, answer))
    )


SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": diffusers.__version__,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
