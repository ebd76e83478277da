"""What one training sample teaches the denoiser: caption, timestep, noise, and the loss.

At the last timestep the input is pure noise and the task is a plain regression, "draw this shape
in this colour inside the mask", so most timesteps are drawn from the noisy end. Two things are
trained besides the usual: structured noise, so that the network corrects what strong guidance
overshoots, and starting from the clean background, so that `strength` below one still paints the
object.

Guidance multiplies the difference of two answers, so some batches are pairs: the same noisy
latents once with a caption and once with a text that asks for nothing, and the difference of the
two answers is trained besides both. Outside the object that difference is nought, which keeps
strong guidance from changing the background's colours.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.builtin.training.captions import Caption, caption_of, nothing
from models.builtin.training.latents import LatentBatch
from models.builtin.training.networks.text import tokenize
from models.builtin.training.networks.unet import TIMESTEPS, build_scheduler

_OBJECT_VISIBLE_BELOW = 850  # timestep; above, an object drowns in the noise
_DIFFERENCE_WEIGHT = 1.5  # guidance makes an error in the difference several times as large
_USUAL_DETAIL, _LEAST_DETAIL = 0.17, 0.1  # variances of latents of scale 1
_RING = 6  # latents around a mask, from which the detail within is judged
_OVERSHOOT_VISIBLE_BELOW = 960  # the same for one that guidance has made several times too strong


@dataclass(frozen=True)
class Lesson:
    """What one sample trains: its caption, the latents it ends at, and its structured noise.

    `push` times (painted - background) is added to the noise: between 0 and 1 what guidance
    overshoots, below 0 what is left of the background when denoising starts from it. `blur` is
    the width of the box it is smoothed with first, as a share of the picture's side: what strong
    guidance makes of a first guess is a blob, and the shape must come from the text all the same.
    """

    caption: Caption
    is_painted: bool
    push: float = 0.0
    blur: float = 0.0


def draw_timesteps(rng: np.random.Generator, count: int, is_early: bool) -> Tensor:
    """Stratified over four ranges, `(n,)`; early on mostly the noisy end, where shapes are made."""
    shares = (0.05, 0.20, 0.45) if is_early else (0.25, 0.55, 0.78)
    places = (np.arange(count) + rng.random(count)) / count
    steps = np.interp(places, [0.0, *shares, 1.0], [0, 550, 930, 980, TIMESTEPS])
    return torch.from_numpy(np.minimum(steps.astype(np.int64), TIMESTEPS - 1))


def draw_lesson(
    batch: LatentBatch, index: int, timestep: int, ratio: float, rng: np.random.Generator
) -> Lesson:
    """`ratio` is the amplitude of the signal over that of the noise at `timestep`."""
    thing = batch.things[index]
    if thing is None:
        return Lesson(Caption(nothing(rng), None), False)
    if rng.random() < 0.2:
        return _empty_lesson(timestep, rng)
    caption = caption_of(thing, rng)
    if 300 <= timestep < 980 and rng.random() < 0.15:
        return Lesson(caption, True, -ratio * rng.uniform(0.5, 1.0))
    if rng.random() < 0.5:
        return Lesson(caption, True, rng.uniform(0.0, 1.0), _blur(rng))
    return Lesson(caption, True)


def _empty_lesson(timestep: int, rng: np.random.Generator) -> Lesson:
    """An empty caption means background, unless an object can already be seen."""
    caption = Caption(nothing(rng), None)
    chance = rng.random()
    if timestep < _OBJECT_VISIBLE_BELOW and chance < 0.15:
        return Lesson(caption, True)
    if timestep < _OVERSHOOT_VISIBLE_BELOW and chance < 0.3:
        return Lesson(caption, True, rng.uniform(0.15, 0.8), _blur(rng))
    return Lesson(caption, False)


def _blur(rng: np.random.Generator) -> float:
    return rng.uniform(0.03, 0.2) if rng.random() < 0.6 else 0.0


class Contexts:
    """Turns captions into the hidden states the UNet attends to, as a serving program makes them.

    A fifth of the batches get a second block of 77 tokens (empty or filler), a fifth of the
    captions have a stretch of tokens scaled, as emphasis brackets do.
    """

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """`(n, 77, 96)`"""
        ids = tokenize(self.tokenizer, texts).to(self.encoder.device)
        hidden: Tensor = self.encoder(ids)[0]
        return hidden

    def draw(self, texts: list[str], rng: np.random.Generator) -> Tensor:
        """`(n, 77 or 154, 96)`"""
        hidden = self.encode(texts)
        for row in hidden:
            if rng.random() < 0.2:
                first = int(rng.integers(1, 60))
                row[first : first + int(rng.integers(1, 30))] *= rng.choice([0.91, 1.1, 1.21, 1.33])
        if rng.random() < 0.2:
            more = [nothing(rng) if rng.random() < 0.4 else "" for _ in texts]
            hidden = torch.cat([hidden, self.encode(more)], dim=1)
        return hidden


@dataclass(frozen=True)
class Exercise:
    """Rows for one step of the network: `noisy`, `wanted` and `masked` `(n, 4, h, w)`.

    With `is_paired` the second half repeats the first one's noisy latents, and its texts ask for
    nothing. `weight` `(n, 1, 1, 1)` is what an error counts.
    """

    texts: list[str]
    noisy: Tensor
    wanted: Tensor
    mask: Tensor
    masked: Tensor
    timesteps: Tensor
    weight: Tensor
    is_paired: bool = False


def draw_exercise(
    batch: LatentBatch, timesteps: Tensor, rng: np.random.Generator, is_paired: bool
) -> Exercise:
    """Noisy latents and the v-prediction wanted for each at `timesteps` `(n,)`."""
    alphas = build_scheduler().alphas_cumprod[timesteps]
    ratios = (alphas / (1.0 - alphas)).sqrt().tolist()
    lessons = [
        draw_lesson(batch, index, int(timesteps[index]), ratios[index], rng)
        for index in range(len(batch.things))
    ]
    device = batch.mask.device
    is_painted = _column([lesson.is_painted for lesson in lessons], device)
    clean = torch.where(is_painted, batch.painted, batch.background)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(clean.shape, generator=generator).to(device)
    noise = noise + structured_noise(batch, lessons)
    signal, spread = _column(alphas.sqrt(), device), _column((1.0 - alphas).sqrt(), device)
    single = Exercise(
        [lesson.caption.text for lesson in lessons],
        signal * clean + spread * noise,
        signal * noise - spread * clean,
        batch.mask,
        batch.masked,
        timesteps.to(device),
        visibility(batch),
    )
    if not is_paired:
        return single
    other = torch.where(_column(_hides_object(lessons, timesteps), device), batch.background, clean)
    # The same noisy latents, read as the other picture under another noise.
    wanted = single.wanted + (clean - other) / spread
    return _paired(single, wanted, [nothing(rng) for _ in lessons])


def _hides_object(lessons: list[Lesson], timesteps: Tensor) -> list[bool]:
    """Whether nobody could tell from the noisy latents that an object is meant."""
    return [
        lesson.push < 0 or step >= _OBJECT_VISIBLE_BELOW
        for lesson, step in zip(lessons, timesteps.tolist(), strict=True)
    ]


def _paired(single: Exercise, wanted: Tensor, texts: list[str]) -> Exercise:
    return Exercise(
        single.texts + texts,
        torch.cat([single.noisy, single.noisy]),
        torch.cat([single.wanted, wanted]),
        torch.cat([single.mask, single.mask]),
        torch.cat([single.masked, single.masked]),
        torch.cat([single.timesteps, single.timesteps]),
        torch.cat([single.weight, single.weight]),
        is_paired=True,
    )


def _column(values: Any, device: torch.device) -> Tensor:
    """One value a row, `(n, 1, 1, 1)`."""
    return torch.as_tensor(values).to(device)[:, None, None, None]


def loss_of(unet: nn.Module, exercise: Exercise, hidden: Tensor) -> tuple[Tensor, float]:
    """Weighted v-loss of an exercise under its texts' states, and its plain mean in the masks."""
    model_input = torch.cat([exercise.noisy, exercise.mask, exercise.masked], dim=1)  # 9 channels
    guess = unet(model_input, exercise.timesteps, hidden).sample
    error = guess.float() - exercise.wanted
    weight = 0.2 + 0.8 * exercise.mask
    weight = exercise.weight * weight / weight.mean(dim=(1, 2, 3), keepdim=True)
    loss = (error.square() * weight).mean()
    if exercise.is_paired:
        first, second = error.chunk(2)
        loss = loss + _DIFFERENCE_WEIGHT * ((first - second).square() * weight.chunk(2)[0]).mean()
    square = error.detach().square().mean(dim=1, keepdim=True)
    return loss, ((square * exercise.mask).sum() / exercise.mask.sum()).item()


def visibility(batch: LatentBatch) -> Tensor:
    """How well an error in the mask would be seen, `(n, 1, 1, 1)`; 1 where a thing is painted.

    A tint that nobody notices among leaves is a blotch in the sky, and of the plain loss leaves
    take nearly all. What counts is the detail around the mask: what is inside must not decide, or
    the network would learn to expect smooth pictures.
    """
    ring = functional.max_pool2d(batch.mask, 2 * _RING + 1, 1, _RING) - batch.mask
    smooth = functional.avg_pool2d(batch.background, 5, 1, 2, count_include_pad=False)
    detail = (batch.background - smooth).square().mean(dim=1, keepdim=True)
    around = (detail * ring).sum(dim=(1, 2, 3)) / ring.sum(dim=(1, 2, 3)).clamp(min=1.0)
    seen = _USUAL_DETAIL / (_LEAST_DETAIL + around)
    is_photograph = torch.tensor([thing is None for thing in batch.things], device=seen.device)
    return _column(torch.where(is_photograph, seen, 1.0), seen.device)


def tempered(batch: LatentBatch, guess: Tensor, temperature: float) -> LatentBatch:
    """Photographs that differ less from the first guess `(n, 4, h, w)` than the real ones do.

    What the network cannot know it would have to invent, and a small one invents wildly: with the
    differences scaled by `temperature`, 0 to 1, what it paints stays closer to the mean.
    """
    pulled = guess + temperature * (batch.background - guess)
    background = torch.where(batch.mask > 0, pulled, batch.background)
    return replace(batch, background=background, painted=background)


def structured_noise(batch: LatentBatch, lessons: list[Lesson]) -> Tensor:
    """What the lessons add to the noise, `(n, 4, h, w)`."""
    difference = batch.painted - batch.background
    added = torch.zeros_like(difference)
    for index, lesson in enumerate(lessons):
        if lesson.push:
            reach = round(0.5 * lesson.blur * difference.shape[-1])
            added[index] = lesson.push * functional.avg_pool2d(
                difference[index], 2 * reach + 1, 1, reach, count_include_pad=False
            )
    return added
