"""The autoencoder: 8x8 pixels to 4 latent channels, from an analytic start.

From an ordinary initialisation this small network stays on a plateau for thousands of steps.
So it starts as a picture scaled down and up again (RGB in channels 0..2 all the way through) and
learns the rest. At the end the latents are brought to mean 0 and deviation 1 per channel inside
`quant_conv` / `post_quant_conv`, so that `scaling_factor` is 1.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from models.builtin.training.checkpoints import Checkpoint
from models.builtin.training.scenes import SHAPES, Picture, Thing, make_scene

WIDTHS = (16, 16, 32, 64)
SAVE_EVERY_S = 30.0
_NORM_BIAS = 2.5  # where SiLU is nearly linear over [-1, 1]
_ANCHOR = 8.0  # constant channels that keep the last norm's statistics constant


@dataclass(frozen=True)
class VaeSettings:
    """`seconds` of training for both halves, then `decoder_seconds` for the decoder alone."""

    seconds: float = 300.0
    decoder_seconds: float = 300.0
    scenes: int = 300
    batch: int = 6
    learning_rate: float = 8e-4
    seed: int = 1


def build_vae() -> AutoencoderKL:
    """An autoencoder that scales a picture down and up; `AutoencoderKL` in fp32."""
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=512,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        _start_as_resampler(vae)
    return vae


def _start_as_resampler(vae: AutoencoderKL) -> None:
    for half in (vae.encoder, vae.decoder):
        for name, module in half.named_modules():
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif name.endswith("conv_shortcut"):
                _pass_rgb(module, torch.ones(1, 1))
            elif "downsamplers" in name and name.endswith("conv"):
                kernel = torch.zeros(3, 3)
                kernel[:2, :2] = 0.25
                _pass_rgb(module, kernel)
            elif "upsamplers" in name and name.endswith("conv"):
                line = torch.tensor([0.25, 0.5, 0.25])
                _pass_rgb(module, torch.outer(line, line))
        centre = torch.zeros(3, 3)
        centre[1, 1] = 1.0
        _pass_rgb(half.conv_in, centre)
        _linearise_output(half)
    vae.encoder.conv_out.weight[4:] = 0.0
    vae.encoder.conv_out.bias[4:] = -5.0
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[..., None, None])
        conv.bias.zero_()


def _pass_rgb(conv: nn.Conv2d, kernel: Tensor) -> None:
    """Output channels 0..2 become input channels 0..2 filtered by `kernel`."""
    conv.weight[:3] = 0.0
    for channel in range(3):
        conv.weight[channel, channel] = kernel
    if conv.bias is not None:
        conv.bias[:3] = 0.0


def _linearise_output(half: Any) -> None:
    """Makes `conv_norm_out` and SiLU nearly the identity on channels 0..2."""
    last = (
        half.mid_block.resnets[-1]
        if hasattr(half, "down_blocks")
        else half.up_blocks[-1].resnets[-1]
    )
    last.conv2.bias[-2] = _ANCHOR
    last.conv2.bias[-1] = -_ANCHOR
    width = half.conv_norm_out.weight.shape[0]
    half.conv_norm_out.weight.fill_(_ANCHOR * math.sqrt(2.0 / width))
    half.conv_norm_out.bias[:3] = _NORM_BIAS
    gate = 1.0 / (1.0 + math.exp(-_NORM_BIAS))
    slope = gate * (1.0 + _NORM_BIAS * (1.0 - gate))
    half.conv_out.weight[:3] = 0.0
    for channel in range(3):
        half.conv_out.weight[channel, channel, 1, 1] = 1.0 / slope
        half.conv_out.bias[channel] = -_NORM_BIAS * gate / slope


def to_tensor(pictures: list[Picture]) -> Tensor:
    """RGB pictures of one size to `(n, 3, h, w)` float in [-1, 1]."""
    stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stack.float() / 127.5 - 1.0


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Mean latents `(n, 4, h/8, w/8)` of pictures `(n, 3, h, w)` in [-1, 1]."""
    latents: Tensor = vae.encode(pixels).latent_dist.mean
    return latents


def crops(settings: VaeSettings, side: int, batch: int) -> Iterator[Tensor]:
    """Endless batches `(batch, 3, side, side)` in [-1, 1], a quarter of them with a grey hole."""
    rng = np.random.default_rng((settings.seed, side))
    pool: list[Picture] = []
    for index in range(settings.scenes):
        scene = make_scene(rng, 256 if index % 3 else 512)
        colours = scene.allowed_colours()
        if rng.random() < 0.28:
            pool.append(scene.erase())
        elif colours:
            thing = Thing(str(rng.choice(list(SHAPES))), str(rng.choice(colours)))
            pool.append(scene.paint(thing, rng))
    while True:
        chosen = []
        for index in rng.integers(len(pool), size=batch):
            picture = pool[index]
            top, left = rng.integers(0, picture.shape[0] - side + 1, 2)
            chosen.append(picture[top : top + side, left : left + side])
        yield to_tensor(chosen)


def train_vae(settings: VaeSettings, checkpoint: Checkpoint) -> AutoencoderKL:
    """Trains both halves, normalises the latents, then trains the decoder; resumes by itself.

    A phase that was interrupted goes on with fresh optimizer moments.
    """
    torch.manual_seed(settings.seed)
    vae = build_vae()
    state = checkpoint.load() or {"phase": "both", "spent": 0.0, "weights": vae.state_dict()}
    vae.load_state_dict(state["weights"])

    def save(phase: str, spent: float) -> None:
        checkpoint.save({"phase": phase, "spent": spent, "weights": vae.state_dict()})

    if state["phase"] == "both":
        phase = Phase("both", settings.seconds, state["spent"], 64, settings.batch)
        _fit(vae, phase, settings, save)
        normalise(vae, crops(settings, 256, 4))
        state = {"phase": "decoder", "spent": 0.0}
        save("decoder", 0.0)
    if state["phase"] == "decoder":
        batch = max(1, settings.batch // 2)
        phase = Phase("decoder", settings.decoder_seconds, state["spent"], 128, batch)
        _fit(vae, phase, settings, save)
        save("done", 0.0)
    return vae


@dataclass(frozen=True)
class Phase:
    """`name` "both" or "decoder", its seconds and those spent before, crop side in px, batch."""

    name: str
    seconds: float
    spent: float
    side: int
    batch: int


def _fit(
    vae: AutoencoderKL, phase: Phase, settings: VaeSettings, save: Callable[[str, float], None]
) -> None:
    """Minimises reconstruction error until the phase's seconds are spent; cosine learning rate."""
    parameters = _trainable(vae, phase.name)
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, (0.9, 0.98))
    batches = crops(settings, phase.side, phase.batch)
    began = saved = time.monotonic()
    bar = tqdm(total=round(phase.seconds), unit="s", desc=f"autoencoder, {phase.name}")
    while (spent := phase.spent + time.monotonic() - began) < phase.seconds:
        cosine = math.cos(0.5 * math.pi * spent / phase.seconds)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (0.05 + 0.95 * cosine)
        pixels = next(batches)
        decoded, loss = _reconstruct(vae, pixels, phase)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.n = round(spent)
        error = functional.mse_loss(decoded.detach().clamp(-1, 1), pixels).item()
        bar.set_postfix(psnr_db=f"{10 * math.log10(4.0 / error):.1f}")
        if time.monotonic() - saved > SAVE_EVERY_S:
            saved = time.monotonic()
            save(phase.name, spent)
    bar.close()


def _trainable(vae: AutoencoderKL, phase: str) -> list[nn.Parameter]:
    """Freezes what the phase leaves alone and returns the rest."""
    chosen = list(vae.parameters())
    if phase == "decoder":
        chosen = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    vae.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _reconstruct(vae: AutoencoderKL, pixels: Tensor, phase: Phase) -> tuple[Tensor, Tensor]:
    """Decoded pictures and their loss; the decoder's phase works on slightly noisy latents."""
    posterior = vae.encode(pixels).latent_dist
    is_both = phase.name == "both"
    noise = torch.randn_like(posterior.mean) * (posterior.std if is_both else 0.05)
    decoded = vae.decode(posterior.mean + noise).sample
    loss = reconstruction_loss(decoded, pixels)
    if is_both:
        loss = loss + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
    return decoded, loss


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 + 2 MSE + half the L1 of the picture's gradients."""
    error = decoded - pixels
    gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2.0 * error.square().mean() + 0.5 * gradients


@torch.no_grad()
def normalise(vae: AutoencoderKL, batches: Iterator[Tensor]) -> None:
    """Folds mean 0 and deviation 1 per latent channel into the two 1x1 convolutions."""
    latents = torch.cat([encode(vae, next(batches)) for _ in range(12)])
    mean = latents.mean(dim=(0, 2, 3))
    deviation = latents.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.weight[4:] = 0.0
    quant.bias[4:] = -9.0  # the pipeline samples the posterior: keep its noise at 1 %
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation[None, :, None, None]
