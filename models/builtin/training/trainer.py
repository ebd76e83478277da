"""The training loop of the denoiser: data-parallel, resumable, from nothing or older weights."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from models.builtin.training.checkpoints import Average, Checkpoint
from models.builtin.training.latents import FACTOR, LatentBatch, LatentStore
from models.builtin.training.lessons import (
    Contexts,
    draw_exercise,
    draw_timesteps,
    loss_of,
    tempered,
)
from models.builtin.training.muon import Optimizers
from models.builtin.training.networks.unet import TIMESTEPS

HELD_OUT_SIDE, HELD_OUT_SCENES = 512, 16


@dataclass(frozen=True)
class BatchPlan:
    """One kind of step: scenes of a `kind` and `side` (px) cut to `window` latents.

    `count` of them per process; `share` is its weight among all plans.
    """

    kind: str
    side: int
    window: int
    count: int
    share: float


@dataclass(frozen=True)
class UNetSettings:
    """`early` is the share of the steps in which shapes are learnt; older weights know them."""

    steps: int = 20_000
    plans: tuple[BatchPlan, ...] = (
        BatchPlan("photographs", 256, 32, 12, 0.44),
        BatchPlan("photographs", 512, 64, 3, 0.32),
        BatchPlan("drawn", 256, 32, 12, 0.04),
        BatchPlan("drawn", 512, 64, 3, 0.06),
        BatchPlan("staged", 256, 32, 12, 0.05),
        BatchPlan("staged", 512, 64, 3, 0.09),
    )
    batch_factor: int = 1
    early: float = 0.5
    steady: float = 0.7  # share of the steps before the learning rate falls
    pairs: float = 0.4  # share of the steps that compare two texts, where there are things
    temperature: float = 0.5  # of photographs, see `tempered`
    learning_rate: float = 5e-4
    average_decay: float = 0.998
    checkpoint_every: int = 100
    use_bfloat16: bool = False
    seed: int = 4


@dataclass(frozen=True)
class Worker:
    """One of `count` data-parallel processes; `rank` 0 writes checkpoints."""

    rank: int
    count: int
    device: torch.device


@dataclass(frozen=True)
class Desk:
    """What training works with: the texts' encoder and the folder of shards and checkpoints."""

    contexts: Contexts
    run: Path


def plan_of(settings: UNetSettings, step: int) -> BatchPlan:
    """The kind of a step, the same in all processes."""
    rng = np.random.default_rng((settings.seed, step))
    weights = np.array([plan.share for plan in settings.plans])
    return settings.plans[int(rng.choice(len(weights), p=weights / weights.sum()))]


def learning_rate_share(settings: UNetSettings, step: int) -> float:
    """Rises over 100 steps, stays at 1 while `steady`, then falls to 0.03 along a cosine."""
    warm = min(1.0, (step + 1) / 100)
    late = max(0.0, step / settings.steps - settings.steady) / (1.0 - settings.steady)
    return warm * (0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, late))))


class UNetTrainer:
    """Data-parallel training with one flattened gradient exchange per step."""

    def __init__(
        self, settings: UNetSettings, desk: Desk, unet: UNet2DConditionModel, worker: Worker
    ) -> None:
        """`unet` is where training starts, unless there is a checkpoint to go on from."""
        self.settings, self.contexts, self.worker = settings, desk.contexts, worker
        self.checkpoint = Checkpoint(desk.run / "unet.pt")
        kinds = {(plan.kind, plan.side) for plan in settings.plans}
        self.stores = {kind: LatentStore(desk.run / "latents", *kind) for kind in kinds}
        self.held_out = LatentStore(desk.run / "latents", "held_out", HELD_OUT_SIDE)
        self.unet = unet.train().to(worker.device, memory_format=torch.channels_last)
        self.optimizer = Optimizers(self.unet, settings.learning_rate, worker.rank, worker.count)
        self.average = Average(self.unet, settings.average_decay)
        self.step = 0
        self._resume()

    def _resume(self) -> None:
        state = self.checkpoint.load()
        if state is None:
            return
        self.unet.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.restore(state["average"])
        self.step = int(state["step"])

    def save(self) -> None:
        if self.worker.rank == 0:
            state = {
                "weights": self.unet.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state(),
                "step": self.step,
            }
            self.checkpoint.save(state)

    def run(self) -> None:
        """Trains up to the settings' last step, all processes together."""
        bar = tqdm(
            total=self.settings.steps,
            initial=self.step,
            unit="step",
            desc="unet",
            disable=self.worker.rank > 0,
        )
        inside: dict[str, float] = {}
        while self.step < self.settings.steps:
            if self.step % self.settings.checkpoint_every == 0:
                self._refresh()
                inside |= self._held_out_error()
            plan = plan_of(self.settings, self.step)
            name, loss = f"{plan.kind}_{plan.window}", self._train(plan)
            inside[name] = 0.98 * inside.get(name, loss) + 0.02 * loss
            self.step += 1
            bar.set_postfix({key: f"{value:.3f}" for key, value in sorted(inside.items())}, False)
            bar.update()
            if self.step % self.settings.checkpoint_every == 0:
                self.save()
        self.save()
        bar.close()

    def _refresh(self) -> None:
        for store in (*self.stores.values(), self.held_out):
            store.refresh()

    @torch.no_grad()
    def _held_out_error(self) -> dict[str, float]:
        """The mean square error of the first guess inside masks of photographs that are held out.

        At the last timestep the input is noise alone, and the velocity wanted is the picture's
        negative. Training losses fall also where photographs are learnt by heart.
        """
        count = min(HELD_OUT_SCENES, self.held_out.scenes)
        if count == 0 or self.worker.rank > 0:
            return {}
        rng = np.random.default_rng(self.settings.seed)
        batch = _to(self.held_out.draw(rng, count, HELD_OUT_SIDE // FACTOR), self.worker.device)
        exercise = draw_exercise(batch, torch.full((count,), TIMESTEPS - 1), rng, False)
        hidden = self.contexts.encode([""] * count)
        return {"held_out": loss_of(self.unet, exercise, hidden)[1]}

    def _train(self, plan: BatchPlan) -> float:
        """One step; the plain loss inside the masks."""
        rng = np.random.default_rng((self.settings.seed, self.step, self.worker.rank))
        store = self.stores[plan.kind, plan.side]
        count = plan.count * self.settings.batch_factor
        batch = _to(store.draw(rng, count, plan.window), self.worker.device)
        has_things = plan.kind != "photographs"
        if not has_things:
            batch = tempered(batch, self._first_guess(batch, rng), self.settings.temperature)
        is_early = has_things and self.step < self.settings.early * self.settings.steps
        timesteps = draw_timesteps(rng, count, is_early)
        is_paired = has_things and _is_paired(self.settings, self.step)
        exercise = draw_exercise(batch, timesteps, rng, is_paired)
        hidden = self.contexts.draw(exercise.texts, rng)
        with torch.autocast(self.worker.device.type, torch.bfloat16, self.settings.use_bfloat16):
            loss, inside = loss_of(self.unet, exercise, hidden)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._exchange_gradients()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        rate = learning_rate_share(self.settings, self.step)
        self.optimizer.step(self.settings.learning_rate * rate)
        self.average.update(self.unet)
        return inside

    @torch.no_grad()
    def _first_guess(self, batch: LatentBatch, rng: np.random.Generator) -> Tensor:
        """What the network makes of noise alone in one step: the mean of all it could paint."""
        count = len(batch.things)
        noise = torch.from_numpy(rng.standard_normal(batch.masked.shape, np.float32))
        noise = noise.to(self.worker.device)
        model_input = torch.cat([noise, batch.mask, batch.masked], dim=1)
        timesteps = torch.full((count,), TIMESTEPS - 1, device=self.worker.device)
        hidden = self.contexts.encode([""] * count)
        with torch.autocast(self.worker.device.type, torch.bfloat16, self.settings.use_bfloat16):
            velocity: Tensor = self.unet(model_input, timesteps, hidden).sample
        return -velocity.float()  # at the last timestep it is the picture's negative

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


def _is_paired(settings: UNetSettings, step: int) -> bool:
    """Whether a step compares two texts, the same in all processes."""
    return bool(np.random.default_rng((settings.seed, step, 1)).random() < settings.pairs)


def _to(batch: LatentBatch, device: torch.device) -> LatentBatch:
    return LatentBatch(
        batch.background.to(device),
        batch.painted.to(device),
        batch.masked.to(device),
        batch.mask.to(device),
        batch.things,
    )
