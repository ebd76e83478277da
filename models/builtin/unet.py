"""The denoiser: v-prediction on a zero terminal SNR schedule, conditioned on the frozen encoder.

At the last timestep the input is pure noise and the task is a plain regression, "draw this shape
in this colour inside the mask", so more than half of the timesteps are drawn from the noisy end.
Two things are trained besides the usual: structured noise, so that the network corrects what
strong guidance overshoots, and starting from the clean background, so that `strength` below one
still paints the object.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from models.builtin.captions import Caption, caption_of, nothing
from models.builtin.checkpoints import Average, Checkpoint
from models.builtin.latents import LatentBatch, LatentStore
from models.builtin.muon import Optimizers
from models.builtin.text import WIDTH, tokenize

TIMESTEPS = 1000
_OBJECT_VISIBLE_BELOW = 850  # timestep; above, an object drowns in the noise
_OVERSHOOT_VISIBLE_BELOW = 960  # the same for one that guidance has made several times too strong


@dataclass(frozen=True)
class BatchPlan:
    """One kind of step: scenes of `side` px cut to `window` latents, `count` per process.

    `shares` are its weights among all kinds, in the early and in the late part of the time.
    """

    side: int
    window: int
    count: int
    shares: tuple[float, float]


@dataclass(frozen=True)
class UNetSettings:
    """`seconds` of training in all, on whatever the machine manages in them."""

    seconds: float = 5400.0
    plans: tuple[BatchPlan, ...] = (
        BatchPlan(256, 24, 20, (0.35, 0.1)),
        BatchPlan(256, 32, 12, (0.15, 0.2)),
        BatchPlan(512, 40, 8, (0.35, 0.4)),
        BatchPlan(512, 64, 3, (0.15, 0.3)),
    )
    early: float = 0.85  # share of the time in which shapes are learnt, before the fine work
    learning_rate: float = 1.5e-3
    average_decay: float = 0.995
    checkpoint_every: int = 100
    seed: int = 4


@dataclass(frozen=True)
class Worker:
    """One of `count` data-parallel processes; `rank` 0 writes checkpoints."""

    rank: int
    count: int
    device: torch.device


def build_unet() -> UNet2DConditionModel:
    """9 channels in, 4 out; attention on the two coarse levels only, so 1024 px stay cheap."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=9,
        out_channels=4,
        block_out_channels=(32, 64, 96, 104),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


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
    if rng.random() < 0.2:
        return _empty_lesson(timestep, rng)
    caption = caption_of(batch.things[index], rng)
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


def loss_of(
    unet: nn.Module,
    batch: LatentBatch,
    timesteps: Tensor,
    contexts: Contexts,
    rng: np.random.Generator,
) -> tuple[Tensor, float]:
    """Weighted v-loss of a batch at `timesteps` `(n,)`, and its plain mean inside the masks."""
    count = len(batch.things)
    alphas = build_scheduler().alphas_cumprod[timesteps]
    ratios = (alphas / (1.0 - alphas)).sqrt().tolist()
    lessons = [draw_lesson(batch, i, int(timesteps[i]), ratios[i], rng) for i in range(count)]
    device = batch.mask.device
    hidden = contexts.draw([lesson.caption.text for lesson in lessons], rng)
    is_painted = torch.tensor([lesson.is_painted for lesson in lessons], device=device)
    clean = torch.where(is_painted[:, None, None, None], batch.painted, batch.background)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(clean.shape, generator=generator).to(device)
    noise = noise + structured_noise(batch, lessons)
    signal = alphas.sqrt().to(device)[:, None, None, None]
    spread = (1.0 - alphas).sqrt().to(device)[:, None, None, None]
    noisy = signal * clean + spread * noise
    wanted = signal * noise - spread * clean
    model_input = torch.cat([noisy, batch.mask, batch.masked], dim=1)  # (n, 9, h, w)
    guess = unet(model_input, timesteps.to(device), hidden).sample
    error = (guess.float() - wanted).square().mean(dim=1, keepdim=True)  # (n, 1, h, w)
    weight = 0.2 + 0.8 * batch.mask
    weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True)
    inside = (error.detach() * batch.mask).sum() / batch.mask.sum()
    return (error * weight).mean(), inside.item()


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


def plan_of(settings: UNetSettings, step: int, share: float) -> BatchPlan:
    """The kind of a step after a `share` of the time, the same in all processes."""
    rng = np.random.default_rng((settings.seed, step))
    weights = np.array([plan.shares[0 if share < settings.early else 1] for plan in settings.plans])
    return settings.plans[int(rng.choice(len(weights), p=weights / weights.sum()))]


def learning_rate_share(step: int, share: float, early: float) -> float:
    """Rises over 100 steps, stays at 1 early on, then falls to 0.03 along a cosine."""
    warm = min(1.0, (step + 1) / 100)
    late = min(1.0, max(0.0, share - early) / (1.0 - early))
    return warm * (0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * late)))


@dataclass
class Progress:
    """Where the training stands: steps done and seconds spent, over all resumed runs."""

    step: int = 0
    spent: float = 0.0


class UNetTrainer:
    """Data-parallel training with one flattened gradient exchange per step."""

    def __init__(
        self, settings: UNetSettings, contexts: Contexts, run: Path, worker: Worker
    ) -> None:
        self.settings, self.contexts, self.worker = settings, contexts, worker
        self.checkpoint = Checkpoint(run / "unet.pt")
        sides = {plan.side for plan in settings.plans}
        self.stores = {side: LatentStore(run / "latents", side) for side in sides}
        torch.manual_seed(settings.seed)
        self.unet = build_unet().to(worker.device)
        self.optimizer = Optimizers(self.unet, settings.learning_rate, worker.rank, worker.count)
        self.average = Average(self.unet, settings.average_decay)
        self.progress = Progress()
        self._resume()

    def _resume(self) -> None:
        state = self.checkpoint.load()
        if state is None:
            return
        self.unet.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.restore(state["average"])
        self.progress = Progress(state["step"], state["spent"])

    def save(self) -> None:
        if self.worker.rank == 0:
            state = {
                "weights": self.unet.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state(),
                "step": self.progress.step,
                "spent": self.progress.spent,
            }
            self.checkpoint.save(state)

    def run(self, on_checkpoint: Callable[[Progress], None] | None = None) -> None:
        """Trains until the settings' seconds are spent, all processes in step."""
        bar = tqdm(
            total=round(self.settings.seconds),
            initial=round(self.progress.spent),
            unit="s",
            desc="unet",
            disable=self.worker.rank > 0,
        )
        inside: dict[int, float] = {}
        while self.progress.spent < self.settings.seconds:
            if self.progress.step % self.settings.checkpoint_every == 0:
                self._refresh()
            began = time.monotonic()
            window, loss = self._step()
            inside[window] = 0.98 * inside.get(window, loss) + 0.02 * loss
            self._advance(time.monotonic() - began)
            bar.n = round(self.progress.spent)
            losses = {f"loss_{window}": f"{value:.3f}" for window, value in sorted(inside.items())}
            bar.set_postfix(step=self.progress.step, **losses)
            if self.progress.step % self.settings.checkpoint_every == 0:
                self.save()
                if on_checkpoint is not None:
                    on_checkpoint(self.progress)
        self.save()
        bar.close()

    def _refresh(self) -> None:
        for store in self.stores.values():
            store.refresh()

    def _step(self) -> tuple[int, float]:
        share = self.progress.spent / self.settings.seconds
        plan = plan_of(self.settings, self.progress.step, share)
        rng = np.random.default_rng((self.settings.seed, self.progress.step, self.worker.rank))
        batch = _to(self.stores[plan.side].draw(rng, plan.count, plan.window), self.worker.device)
        timesteps = draw_timesteps(rng, plan.count, share < self.settings.early)
        rate = learning_rate_share(self.progress.step, share, self.settings.early)
        on_cuda = self.worker.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
            loss, inside = loss_of(self.unet, batch, timesteps, self.contexts, rng)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._exchange_gradients()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step(self.settings.learning_rate * rate)
        self.average.update(self.unet)
        return plan.window, inside

    def _exchange_gradients(self) -> None:
        if self.worker.count == 1:
            return
        gradients = [p.grad for p in self.unet.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.worker.count
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()

    def _advance(self, seconds: float) -> None:
        """Counts a step; the first process's clock holds for all, so that all stop together."""
        clock = torch.tensor([seconds], dtype=torch.float64)
        if self.worker.count > 1:
            distributed.broadcast(clock, src=0)
        self.progress = Progress(self.progress.step + 1, self.progress.spent + clock.item())


def averaged_unet(state: dict[str, Any]) -> UNet2DConditionModel:
    """The network with the averaged weights of a checkpoint."""
    unet = build_unet()
    unet.load_state_dict(state["weights"])
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(state["average"]["values"][name])
    return unet.eval()


def _to(batch: LatentBatch, device: torch.device) -> LatentBatch:
    return LatentBatch(
        batch.background.to(device),
        batch.painted.to(device),
        batch.masked.to(device),
        batch.mask.to(device),
        batch.things,
    )
