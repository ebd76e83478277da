"""The training loop of the denoiser: data-parallel, by the clock, resumable."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
from torch import nn
from tqdm import tqdm

from models.builtin.training.checkpoints import Average, Checkpoint
from models.builtin.training.latents import LatentBatch, LatentStore
from models.builtin.training.lessons import Contexts, draw_timesteps, loss_of
from models.builtin.training.muon import Optimizers
from models.builtin.training.networks.unet import build_unet


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

    def run(self) -> None:
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


def _to(batch: LatentBatch, device: torch.device) -> LatentBatch:
    return LatentBatch(
        batch.background.to(device),
        batch.painted.to(device),
        batch.masked.to(device),
        batch.mask.to(device),
        batch.things,
    )
