"""`python -m models.builtin.training.train --out DIR`: makes the built-in model from nothing.

Six stages, each resumable and each skipped once done: autoencoder, text encoder, latents, unet,
safety checker, export. Checkpoints live in `--run`; equal seeds and speed give equal weights.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as distributed
from diffusers import AutoencoderKL
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from models.builtin.training.checkpoints import Checkpoint
from models.builtin.training.export import Parts, export, folder_bytes
from models.builtin.training.latents import LatentSettings, make_shards
from models.builtin.training.lessons import Contexts
from models.builtin.training.networks.safety import (
    SafetySettings,
    build_image_processor,
    train_safety,
)
from models.builtin.training.networks.text import TextSettings, train_text
from models.builtin.training.networks.unet import averaged_unet
from models.builtin.training.networks.vae import VaeSettings, train_vae
from models.builtin.training.trainer import UNetSettings, UNetTrainer, Worker


@dataclass(frozen=True)
class TrainSettings:
    """Where results go, on what they are made, and the settings of each stage."""

    out: Path
    run: Path
    device: str = "cpu"
    processes: int = 1
    vae: VaeSettings = field(default_factory=VaeSettings)
    text: TextSettings = field(default_factory=TextSettings)
    latents: LatentSettings = field(default_factory=LatentSettings)
    unet: UNetSettings = field(default_factory=UNetSettings)
    safety: SafetySettings = field(default_factory=SafetySettings)


def run_vae(settings: TrainSettings) -> AutoencoderKL:
    return train_vae(settings.vae, Checkpoint(settings.run / "vae.pt")).eval()


def run_text(settings: TrainSettings) -> tuple[CLIPTokenizer, CLIPTextModel]:
    tokenizer, encoder, accuracy = train_text(settings.text, Checkpoint(settings.run / "text.pt"))
    tqdm.write(f"text encoder: {accuracy:.1%} of new captions read right")
    return tokenizer, encoder


def run_latents(settings: TrainSettings) -> None:
    _in_processes(_latent_process, settings)


def run_unet(settings: TrainSettings) -> None:
    _in_processes(_unet_process, settings)


def run_safety(settings: TrainSettings) -> None:
    _, accuracy = train_safety(settings.safety, Checkpoint(settings.run / "safety.pt"))
    tqdm.write(f"safety checker: {accuracy:.1%} of new scenes judged right")


def run_export(settings: TrainSettings) -> None:
    """Raises `FileNotFoundError` if the unet has no checkpoint yet."""
    state = Checkpoint(settings.run / "unet.pt").load()
    if state is None:
        raise FileNotFoundError(f"no unet checkpoint in {settings.run}")
    tokenizer, encoder = run_text(settings)
    checker, _ = train_safety(settings.safety, Checkpoint(settings.run / "safety.pt"))
    parts = Parts(
        vae=run_vae(settings),
        unet=averaged_unet(state),
        tokenizer=tokenizer,
        text_encoder=encoder,
        safety_checker=checker,
        image_processor=build_image_processor(),
    )
    export(parts, settings.out)
    tqdm.write(f"{settings.out}: {folder_bytes(settings.out) / 1e6:.2f} MB")


STAGES: dict[str, Callable[[TrainSettings], object]] = {
    "vae": run_vae,
    "text": run_text,
    "latents": run_latents,
    "unet": run_unet,
    "safety": run_safety,
    "export": run_export,
}


def run_stages(settings: TrainSettings, chosen: str) -> None:
    """Runs one stage of `STAGES`, or `all`; earlier ones must have been run before."""
    settings.run.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if chosen in ("all", name):
            stage(settings)


def _in_processes(work: Callable[[int, TrainSettings], None], settings: TrainSettings) -> None:
    """Runs `work(rank, settings)` in each process, in this one if there is only one."""
    if settings.processes == 1:
        work(0, settings)
        return
    (settings.run / "processes").unlink(missing_ok=True)
    spawn(work, args=(settings,), nprocs=settings.processes)  # type: ignore[no-untyped-call]


def _latent_process(rank: int, settings: TrainSettings) -> None:
    _share_cores(settings)
    vae = run_vae(settings).to(settings.device)
    part = (rank, settings.processes)
    paths = make_shards(vae, settings.run / "latents", settings.latents, part)
    for _ in tqdm(paths, desc="latents", unit="shard", disable=rank > 0):
        pass


def _unet_process(rank: int, settings: TrainSettings) -> None:
    _share_cores(settings)
    if settings.processes > 1:
        meeting = f"file://{settings.run.absolute() / 'processes'}"
        distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=settings.processes
        )
    tokenizer, encoder = run_text(settings)
    worker = Worker(rank, settings.processes, torch.device(settings.device))
    contexts = Contexts(tokenizer, encoder.to(worker.device))
    UNetTrainer(settings.unet, contexts, settings.run, worker).run()
    if settings.processes > 1:
        distributed.destroy_process_group()


def _share_cores(settings: TrainSettings) -> None:
    if settings.processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.processes))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.builtin.training.train", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished weights")
    parser.add_argument("--run", type=Path, default=Path("build/builtin"), help="checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes (cpu)")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--minutes", type=float, default=90.0, help="of unet training, in all")
    chosen = parser.parse_args(arguments)
    settings = TrainSettings(
        chosen.out, chosen.run, device=chosen.device, processes=chosen.processes
    )
    settings = replace(settings, unet=replace(settings.unet, seconds=60 * chosen.minutes))
    run_stages(settings, chosen.stage)


if __name__ == "__main__":
    main()
