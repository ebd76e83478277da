"""`python -m models.builtin.training.train --out DIR --photographs ROOT`: makes the built-in model.

Six stages, each resumable and each skipped once done: autoencoder, text encoder, latents, unet,
safety checker, export. Checkpoints live in `--run`. With `--start` the autoencoder and the unet
go on from the weights of an older model, whose text encoder is kept as it is.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as distributed
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from models.builtin.training.checkpoints import Checkpoint
from models.builtin.training.export import Parts, export, folder_bytes
from models.builtin.training.latents import LatentSettings, ShardMaker
from models.builtin.training.lessons import Contexts
from models.builtin.training.networks.safety import (
    SafetySettings,
    build_image_processor,
    build_safety_checker,
    train_safety,
)
from models.builtin.training.networks.text import TextSettings, train_text
from models.builtin.training.networks.unet import averaged_unet, build_unet
from models.builtin.training.networks.vae import VaeSettings, build_vae, is_trained, train_vae
from models.builtin.training.photographs import Album
from models.builtin.training.trainer import Desk, UNetSettings, UNetTrainer, Worker


@dataclass(frozen=True)
class TrainSettings:
    """Where results go, on what they are made, and the settings of each stage.

    `photographs` is the folder the Debian packages are unpacked to, `start` an older model.
    """

    out: Path
    run: Path
    photographs: Path
    start: Path | None = None
    device: str = "cpu"
    processes: int = 1
    vae: VaeSettings = field(default_factory=VaeSettings)
    text: TextSettings = field(default_factory=TextSettings)
    latents: LatentSettings = field(default_factory=LatentSettings)
    unet: UNetSettings = field(default_factory=UNetSettings)
    safety: SafetySettings = field(default_factory=SafetySettings)


def run_vae(settings: TrainSettings) -> AutoencoderKL:
    checkpoint = Checkpoint(settings.run / "vae.pt")
    vae = build_vae()
    if settings.start is not None:
        vae = AutoencoderKL.from_pretrained(settings.start / "vae", dtype=torch.float32)
    is_done = is_trained(checkpoint.load(), settings.vae)
    album = None if is_done else Album.for_training(settings.photographs)
    return train_vae(settings.vae, checkpoint, vae.to(settings.device), album).eval()


def run_text(settings: TrainSettings) -> tuple[CLIPTokenizer, CLIPTextModel]:
    if settings.start is not None:
        encoder = CLIPTextModel.from_pretrained(
            settings.start / "text_encoder", dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(settings.start / "tokenizer")
        return tokenizer, encoder.requires_grad_(False).eval()
    tokenizer, encoder, accuracy = train_text(settings.text, Checkpoint(settings.run / "text.pt"))
    tqdm.write(f"text encoder: {accuracy:.1%} of new captions read right")
    return tokenizer, encoder


def run_latents(settings: TrainSettings) -> None:
    _in_processes(_latent_process, settings)


def run_unet(settings: TrainSettings) -> None:
    _in_processes(_unet_process, settings)


def run_safety(settings: TrainSettings) -> None:
    album = Album.for_training(settings.photographs)
    _, accuracy = train_safety(settings.safety, Checkpoint(settings.run / "safety.pt"), album)
    tqdm.write(f"safety checker: {accuracy:.1%} of new scenes judged right")


def run_export(settings: TrainSettings) -> None:
    """Raises `FileNotFoundError` if the unet has no checkpoint yet."""
    state = Checkpoint(settings.run / "unet.pt").load()
    if state is None:
        raise FileNotFoundError(f"no unet checkpoint in {settings.run}")
    tokenizer, encoder = run_text(settings)
    parts = Parts(
        vae=run_vae(settings).cpu(),
        unet=averaged_unet(state),
        tokenizer=tokenizer,
        text_encoder=encoder,
        safety_checker=_safety_checker(settings),
        image_processor=build_image_processor(),
    )
    export(parts, settings.out)
    tqdm.write(f"{settings.out}: {folder_bytes(settings.out) / 1e6:.2f} MB")


def _safety_checker(settings: TrainSettings) -> StableDiffusionSafetyChecker:
    """The trained one, or before that the older model's, so that the rest can be looked at."""
    state = Checkpoint(settings.run / "safety.pt").load()
    if state is None and settings.start is not None:
        folder = settings.start / "safety_checker"
        older: StableDiffusionSafetyChecker = StableDiffusionSafetyChecker.from_pretrained(
            folder, dtype=torch.float32
        )
        return older
    if state is None:
        raise FileNotFoundError(f"no safety checkpoint in {settings.run}")
    checker = build_safety_checker()
    checker.load_state_dict(state["weights"])
    return checker.eval()


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
    vae = run_vae(settings)
    root = settings.photographs
    albums = Album.for_training(root), Album.of_held_out(root)
    maker = ShardMaker(vae, settings.latents, *albums)
    paths = maker.make(settings.run / "latents", (rank, settings.processes))
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
    desk = Desk(Contexts(tokenizer, encoder.to(worker.device)), settings.run)
    UNetTrainer(settings.unet, desk, _first_unet(settings), worker).run()
    if settings.processes > 1:
        distributed.destroy_process_group()


def _first_unet(settings: TrainSettings) -> UNet2DConditionModel:
    torch.manual_seed(settings.unet.seed)
    if settings.start is None:
        return build_unet()
    return UNet2DConditionModel.from_pretrained(settings.start / "unet", dtype=torch.float32)


def _share_cores(settings: TrainSettings) -> None:
    if settings.processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.processes))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.builtin.training.train", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished weights")
    parser.add_argument("--photographs", type=Path, required=True, help="unpacked Debian packages")
    parser.add_argument("--run", type=Path, default=Path("build/builtin"), help="checkpoints")
    parser.add_argument("--start", type=Path, help="weights of an older model to go on from")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes (cpu)")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16")
    parser.add_argument("--batch-factor", type=int, default=1, help="more rows a step, for a GPU")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--vae-steps", type=int, default=VaeSettings.steps, help="of both halves")
    parser.add_argument("--decoder-steps", type=int, default=VaeSettings.decoder_steps)
    parser.add_argument("--steps", type=int, default=UNetSettings.steps, help="of the unet, in all")
    chosen = parser.parse_args(arguments)
    run_stages(_settings_of(chosen), chosen.stage)


def _settings_of(chosen: argparse.Namespace) -> TrainSettings:
    has_start = chosen.start is not None
    return TrainSettings(
        chosen.out,
        chosen.run,
        chosen.photographs,
        start=chosen.start,
        device=chosen.device,
        processes=chosen.processes,
        vae=VaeSettings(
            steps=chosen.vae_steps,
            decoder_steps=chosen.decoder_steps,
            use_bfloat16=chosen.bfloat16,
        ),
        latents=LatentSettings(use_bfloat16=chosen.bfloat16),
        unet=UNetSettings(
            steps=chosen.steps,
            batch_factor=chosen.batch_factor,
            early=0.0 if has_start else UNetSettings.early,
            use_bfloat16=chosen.bfloat16,
        ),
    )


if __name__ == "__main__":
    main()
