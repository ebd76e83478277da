"""What a picture was made of, as the text AUTOMATIC1111's web UI writes into its PNGs.

Other programs read it back: one line per prompt, and one of names and values. Torch-free.
Source: `modules/processing.py` and `modules/infotext_utils.py` there.
"""

import json
from pathlib import PurePath

from models.params import Fill, InpaintParams, SchedulerName

CAPTION_KEYWORD = "parameters"
"""The PNG keyword such programs look for."""

SAMPLERS = {
    SchedulerName.DDIM: "DDIM",
    SchedulerName.DDPM: "DDPM",
    SchedulerName.DEIS: "DEIS",
    SchedulerName.DPM_MULTISTEP: "DPM++ 2M",
    SchedulerName.DPM_SINGLESTEP: "DPM++ 2S",
    SchedulerName.EULER: "Euler",
    SchedulerName.EULER_ANCESTRAL: "Euler a",
    SchedulerName.HEUN: "Heun",
    SchedulerName.KDPM2: "DPM2",
    SchedulerName.KDPM2_ANCESTRAL: "DPM2 a",
    SchedulerName.LCM: "LCM",
    SchedulerName.PNDM: "PLMS",
    SchedulerName.UNIPC: "UniPC",
}
"""The web UI's names; those it has no sampler for keep their own."""

MASKED_CONTENT = {
    Fill.BLUR: "fill",
    Fill.NOISE: "latent noise",
    Fill.ZERO: "latent nothing",
}
"""The web UI's names of what is not the original."""


def write_caption(
    params: InpaintParams, seed: int, scheduler: SchedulerName | None, model: str
) -> str:
    """The caption of one picture.

    LoRAs are the tags behind the prompt by which the web UI asks for them.
    seed: the picture's own. scheduler: the one that ran; None leaves it out.
    model: its id, of which a folder's path is not told.
    """
    values: dict[str, object] = {
        "Steps": params.num_inference_steps,
        "Sampler": None if scheduler is None else SAMPLERS[scheduler],
        "Schedule type": params.noise_spacing and params.noise_spacing.capitalize(),
        "CFG scale": f"{params.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{params.width}x{params.height}",
        "Model": quoted(PurePath(model).name.removesuffix(".safetensors")),
        "Denoising strength": f"{params.strength:g}",
        "Clip skip": params.clip_skip + 1 if params.clip_skip else None,
        "Masked content": MASKED_CONTENT.get(params.fill),
    }
    tags = [f"<lora:{lora.name}:{lora.scale:g}>" for lora in params.loras]
    lines = [" ".join([params.prompt, *tags])]
    if params.negative_prompt:
        lines.append(f"Negative prompt: {params.negative_prompt}")
    lines.append(
        ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)
    )
    return "\n".join(lines)


def quoted(value: str) -> str:
    """A value as it is, or as a JSON text where it would look like several."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value
