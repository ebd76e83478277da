"""The checkpoints that are measured: the built-in one, and full-size ones of random weights.

Speed does not depend on what weights mean, so a folder made from published configurations stands
in for a download. Also here: what each costs in floating-point operations.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from models.checkpoints.catalog import BUILTIN_FOLDER, ModelSpec
from models.checkpoints.registry import Components, load_components

PEAK_TFLOPS = 790.0
"""Dense half-precision multiply-adds of an H100 or H200 as large matrix products reach them;
measured: 798 and 788 on 8192x8192x8192, power-limited. The data sheet says 989."""


@dataclass(frozen=True, slots=True)
class Cost:
    """TFLOP (2 per multiply-add) at one size, attention without its masked part.

    unet_row: one row of a UNet call; encode, decode: one picture through the VAE; text: a pair of
    prompts. Counted with `torch.utils.flop_counter` over the architectures on the meta device.
    """

    unet_row: float
    encode: float
    decode: float
    text: float

    def floor_s(self, step_counts: Sequence[int]) -> float:
        """Seconds that no implementation can beat at `PEAK_TFLOPS`; one encode is needed each."""
        rows = 2 * sum(step_counts)
        fixed = self.encode + self.decode + self.text
        return (rows * self.unet_row + len(step_counts) * fixed) / PEAK_TFLOPS


COSTS = {
    ("sd15", 512): Cost(unet_row=0.803, encode=1.12, decode=2.51, text=0.027),
    ("sd15", 1024): Cost(unet_row=4.67, encode=4.88, decode=10.47, text=0.027),
    ("sdxl", 1024): Cost(unet_row=6.76, encode=4.88, decode=10.47, text=0.222),
}


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Half precision where it is fast."""
    return torch.float16 if device.type == "cuda" else torch.float32


def is_supported(family: str) -> bool:
    """Whether the loader in this tree knows the family."""
    return family != "sdxl" or "text_encoder_2" in {field.name for field in fields(Components)}


def checkpoint_folder(family: str, scratch: Path) -> Path:
    """The checkpoint in diffusers layout; made below `scratch` unless it is the built-in one."""
    if family == "builtin":
        return BUILTIN_FOLDER
    folder = scratch / family
    if not (folder / "model_index.json").is_file():
        save_checkpoint(folder, FAMILIES[family])
    return folder


def load(folder: Path) -> Components:
    """A fresh copy on the default device, by the server's own loader."""
    quieten_libraries()
    device = default_device()
    return load_components(
        ModelSpec(id=folder.name, source=str(folder)), device, default_dtype(device)
    )


def quieten_libraries() -> None:
    """No progress bars, and no warnings of what a benchmark does on purpose."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def save_checkpoint(folder: Path, make_parts: Callable[[], dict[str, Any]]) -> None:
    """Write random weights in half precision; the built-in model's tokenizer splits the prompts."""
    torch.manual_seed(0)
    with default_device():
        parts = make_parts()
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float16)
        part.save_pretrained(folder / name)
    index: dict[str, Any] = {name: describe(part) for name, part in parts.items()}
    index["_class_name"] = (
        "StableDiffusionXLInpaintPipeline"
        if "text_encoder_2" in parts
        else "StableDiffusionInpaintPipeline"
    )
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    # Last: a folder without it was not finished.
    (folder / "model_index.json").write_text(json.dumps(index))


def add_safety_checker(folder: Path, config: CLIPConfig) -> None:
    """Give a checkpoint a checker of random weights, which flags nothing."""
    from transformers import CLIPImageProcessor  # says at once which packages it lacks

    with default_device():
        checker = StableDiffusionSafetyChecker(config)
    # Its concepts are alike and out of reach: as made, a cosine has to be above 1.
    checker.to(torch.float16).save_pretrained(folder / "safety_checker")
    side = config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    processor.save_pretrained(folder / "feature_extractor")
    place = folder / "model_index.json"
    index = json.loads(place.read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    place.write_text(json.dumps(index))


def checker_config() -> CLIPConfig:
    """The checker of SD 1.5: CLIP ViT-L/14, 304 million weights."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    return CLIPConfig(vision_config=vision, projection_dim=768)


def describe(part: Any) -> list[str]:
    """Library and class, as a model index names them."""
    return [type(part).__module__.split(".")[0], type(part).__name__]


def make_sd15() -> dict[str, Any]:
    """As `stable-diffusion-v1-5/stable-diffusion-inpainting`."""
    return {
        "tokenizer": make_tokenizer(),
        "text_encoder": CLIPTextModel(clip_l_config()),
        "vae": make_vae(scaling_factor=0.18215),
        "unet": make_sd15_unet(),
        "scheduler": make_scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
    }


def make_sdxl() -> dict[str, Any]:
    """As `diffusers/stable-diffusion-xl-1.0-inpainting-0.1`."""
    return {
        "tokenizer": make_tokenizer(),
        "tokenizer_2": make_tokenizer(),
        "text_encoder": CLIPTextModel(clip_l_config()),
        "text_encoder_2": CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
                projection_dim=1280,
                **token_ids(),
            )
        ),
        "vae": make_vae(scaling_factor=0.13025),
        "unet": make_sdxl_unet(),
        "scheduler": make_scheduler("EulerDiscreteScheduler", timestep_spacing="leading"),
    }


FAMILIES = {"sd15": make_sd15, "sdxl": make_sdxl}


def make_sd15_unet() -> Any:
    """The UNet of SD 1.5 inpainting."""
    return UNet2DConditionModel(sample_size=64, in_channels=9, cross_attention_dim=768)


def make_sdxl_unet() -> Any:
    """The UNet of SDXL inpainting."""
    return UNet2DConditionModel(
        sample_size=128,
        in_channels=9,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


UNETS: dict[str, Callable[[], Any]] = {"sd15": make_sd15_unet, "sdxl": make_sdxl_unet}


def make_scheduler(class_name: str, **special: Any) -> Any:
    """With the noise schedule of all Stable Diffusion families."""
    # Its tables are made on the host, whatever the default device is.
    with torch.device("cpu"):
        return getattr(diffusers, class_name)(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            **special,
        )


def make_tokenizer() -> Any:
    """Any vocabulary will do: a prompt has 77 tokens whatever they are."""
    return CLIPTokenizer.from_pretrained(BUILTIN_FOLDER / "tokenizer", local_files_only=True)


def token_ids() -> dict[str, int]:
    """The full vocabulary's size, with the marks of the tokenizer that is used."""
    tokenizer = make_tokenizer()
    return {
        "vocab_size": 49408,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def clip_l_config() -> Any:
    """The text encoder of SD 1.5, and the first one of SDXL."""
    return CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        **token_ids(),
    )


def make_vae(scaling_factor: float) -> Any:
    """The autoencoder that all Stable Diffusion families share but for the scale of its latents."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=scaling_factor,
    )
