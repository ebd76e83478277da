"""The autoencoder: 8x8 pixels to 4 latent channels, from an analytic start.

From an ordinary initialisation this small network stays on a plateau for thousands of steps.
So it starts as a picture scaled down and up again (RGB in channels 0..2 all the way through), or
from older weights, and learns the rest. With no steps for both halves the latents stay what they
were, so that a denoiser of the older weights still fits. Otherwise they are brought to mean 0 and
deviation 1 per channel inside `quant_conv` / `post_quant_conv`, so that `scaling_factor` is 1.
"""

import math
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
from models.builtin.training.photographs import Album, photographic_scene
from models.builtin.training.scenes import SHAPES, Picture, Thing, make_scene

WIDTHS = (16, 16, 32, 64)
SAVE_EVERY = 100  # steps
_NORM_BIAS = 2.5  # where SiLU is nearly linear over [-1, 1]
_TEXTURE_WEIGHT = 0.5
_ANCHOR = 8.0  # constant channels that keep the last norm's statistics constant


@dataclass(frozen=True)
class VaeSettings:
    """`steps` of training for both halves, then `decoder_steps` for the decoder alone.

    They work on crops of `side` px out of `drawn` scenes and, with an album, `photographs`.
    """

    steps: int = 3000
    decoder_steps: int = 3000
    side: int = 128
    drawn: int = 200
    photographs: int = 1500
    batch: int = 8
    learning_rate: float = 8e-4
    use_bfloat16: bool = False
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


def crops(settings: VaeSettings, album: Album | None) -> Iterator[Tensor]:
    """Endless batches `(batch, 3, side, side)` in [-1, 1], three quarters of photographs.

    A quarter of the pictures have a grey hole, as the pipeline makes it.
    """
    rng = np.random.default_rng((settings.seed, settings.side))
    drawn = [_drawn_picture(rng, 256 if index % 3 else 512) for index in range(settings.drawn)]
    taken: list[Picture] = []
    if album is not None:
        taken = [_holed_picture(album, rng) for _ in range(settings.photographs)]
    while True:
        chosen = []
        for _ in range(settings.batch):
            pool = taken if taken and rng.random() < 0.75 else drawn
            picture = pool[int(rng.integers(len(pool)))]
            top, left = rng.integers(0, picture.shape[0] - settings.side + 1, 2)
            chosen.append(picture[top : top + settings.side, left : left + settings.side])
        yield to_tensor(chosen)


def _drawn_picture(rng: np.random.Generator, side: int) -> Picture:
    scene = make_scene(rng, side)
    colours = scene.allowed_colours()
    if not colours or rng.random() < 0.28:
        return scene.erase()
    return scene.paint(Thing(str(rng.choice(list(SHAPES))), str(rng.choice(colours))), rng)


def _holed_picture(album: Album, rng: np.random.Generator) -> Picture:
    scene = photographic_scene(album, rng, 256)
    return scene.erase() if rng.random() < 0.25 else scene.background


def train_vae(
    settings: VaeSettings, checkpoint: Checkpoint, vae: AutoencoderKL, album: Album | None
) -> AutoencoderKL:
    """Trains both halves, normalises the latents, then trains the decoder; resumes by itself.

    Works on the device of `vae`, and changes it. A phase that was interrupted goes on with fresh
    optimizer moments.
    """
    torch.manual_seed(settings.seed)
    state = checkpoint.load() or {"phase": "both", "step": 0, "weights": vae.state_dict()}
    vae.load_state_dict(state["weights"])
    if is_trained(state, settings):
        return vae
    device = next(vae.parameters()).device
    batches = (pixels.to(device) for pixels in crops(settings, album))

    def save(phase: str, step: int) -> None:
        checkpoint.save({"phase": phase, "step": step, "weights": vae.state_dict()})

    if state["phase"] == "both":
        if settings.steps:
            _fit(vae, Phase("both", settings.steps, state["step"], batches), settings, save)
            normalise(vae, batches)
        state = {"phase": "decoder", "step": 0}
        save("decoder", 0)
    _fit(vae, Phase("decoder", settings.decoder_steps, state["step"], batches), settings, save)
    save("decoder", settings.decoder_steps)
    return vae


def is_trained(state: dict[str, Any] | None, settings: VaeSettings) -> bool:
    """Whether a checkpoint holds the decoder after all of its steps."""
    return (
        state is not None
        and state["phase"] == "decoder"
        and int(state["step"]) >= settings.decoder_steps
    )


@dataclass(frozen=True)
class Phase:
    """`name` "both" or "decoder", its steps, those done before, and what it trains on."""

    name: str
    steps: int
    done: int
    batches: Iterator[Tensor]


def _fit(
    vae: AutoencoderKL, phase: Phase, settings: VaeSettings, save: Callable[[str, int], None]
) -> None:
    """Minimises reconstruction error up to the phase's last step; cosine learning rate."""
    parameters = _trainable(vae, phase.name)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, (0.9, 0.98))
    bar = tqdm(range(phase.done, phase.steps), desc=f"autoencoder, {phase.name}", unit="step")
    mean_psnr = 0.0
    for step in bar:
        warm = min(1.0, (step - phase.done + 1) / 30)
        cosine = math.cos(0.5 * math.pi * step / phase.steps)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * warm * (0.03 + 0.97 * cosine)
        pixels = next(phase.batches)
        with torch.autocast(pixels.device.type, torch.bfloat16, settings.use_bfloat16):
            decoded, loss = _reconstruct(vae, pixels, phase)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        error = functional.mse_loss(decoded.detach().clamp(-1, 1), pixels).item()
        psnr = 10 * math.log10(4.0 / error)
        mean_psnr = 0.98 * mean_psnr + 0.02 * psnr if mean_psnr else psnr
        bar.set_postfix({"psnr_db": f"{mean_psnr:.1f}"}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            save(phase.name, step + 1)


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
    posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
    is_both = phase.name == "both"
    noise = torch.randn_like(posterior.mean) * (posterior.std if is_both else 0.05)
    decoded = vae.decode(posterior.mean + noise).sample.float()
    loss = reconstruction_loss(decoded, pixels)
    if is_both:
        kl: Tensor = posterior.kl()
        return decoded, loss + 2e-4 * kl.float().mean() / posterior.mean[0].numel()
    return decoded, loss + _TEXTURE_WEIGHT * texture_loss(decoded, pixels)


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 + 2 MSE + half the L1 of the picture's gradients."""
    error = decoded - pixels
    gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2.0 * error.square().mean() + 0.5 * gradients


def texture_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """How far the local strength of the picture's gradients is off, wherever exactly they lie.

    Without it the decoder answers what it cannot know with a blur.
    """
    loss = torch.zeros((), device=pixels.device)
    for axis in (2, 3):
        strengths = [
            functional.avg_pool2d(picture.diff(dim=axis).abs(), 8, 4)
            for picture in (decoded, pixels)
        ]
        loss = loss + (strengths[0] - strengths[1]).abs().mean()
    return loss


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
