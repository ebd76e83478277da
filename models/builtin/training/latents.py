"""Scenes encoded once by the frozen autoencoder, in shards on disk, and batches drawn from them.

A shard is seeded by its number, so any process can make any of them, in any order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.builtin.training.captions import random_thing
from models.builtin.training.checkpoints import Checkpoint
from models.builtin.training.networks.vae import encode, to_tensor
from models.builtin.training.scenes import COLOURS, SHAPES, Picture, Thing, make_scene

FACTOR = 8  # pixels per latent
THINGS_PER_SCENE = 2
_COLOUR_NAMES = list(COLOURS)
_SHAPE_NAMES = list(SHAPES)


@dataclass(frozen=True)
class LatentSettings:
    """Shards of each picture size, `{side in px: (shards, scenes per shard)}`."""

    shards: tuple[tuple[int, int, int], ...] = ((256, 120, 32), (512, 120, 8))
    seed: int = 3


@dataclass(frozen=True)
class LatentBatch:
    """Latents `(n, 4, h, w)` of normalised scale; `mask` `(n, 1, h, w)` in {0, 1}."""

    background: Tensor
    painted: Tensor
    masked: Tensor
    mask: Tensor
    things: list[Thing]


def shard_path(folder: Path, side: int, index: int) -> Path:
    return folder / f"latents-{side}-{index:04d}.pt"


def make_shards(
    vae: AutoencoderKL, folder: Path, settings: LatentSettings, part: tuple[int, int]
) -> Iterator[Path]:
    """Writes the missing shards of `part` = (which, of how many); yields each path when there."""
    most = max(shards for _, shards, _ in settings.shards)
    device = next(vae.parameters()).device
    for index in range(part[0], most, part[1]):
        for side, shards, scenes in settings.shards:
            path = shard_path(folder, side, index)
            if index < shards and not path.exists():
                seed = (settings.seed, side, index)
                Checkpoint(path).save(_encode_scenes(vae, seed, scenes, device))
                yield path


def _encode_scenes(
    vae: AutoencoderKL, seed: tuple[int, int, int], scenes: int, device: torch.device
) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    side = seed[1]
    latents: list[Tensor] = []
    masks: list[Tensor] = []
    things: list[list[tuple[int, int]]] = []
    while len(latents) < scenes:
        scene = make_scene(rng, side)
        colours = scene.allowed_colours()
        if not colours:
            continue
        chosen = [random_thing(rng, colours) for _ in range(THINGS_PER_SCENE)]
        pictures: list[Picture] = [scene.background, scene.erase()]
        pictures += [scene.paint(thing, rng) for thing in chosen]
        encoded = [encode(vae, to_tensor([picture]).to(device)) for picture in pictures]
        latents.append(torch.cat(encoded).half().cpu())
        masks.append(torch.from_numpy(scene.mask[::FACTOR, ::FACTOR].copy()))
        things.append([thing_ids(thing) for thing in chosen])
    return {
        "latents": torch.stack(latents),  # (scenes, 2 + things, 4, h, w)
        "masks": torch.stack(masks),  # (scenes, h, w)
        "things": torch.tensor(things),  # (scenes, things, 2)
    }


def thing_ids(thing: Thing) -> tuple[int, int]:
    return _SHAPE_NAMES.index(thing.shape), _COLOUR_NAMES.index(thing.colour)


class LatentStore:
    """All shards of one picture size found in a folder; `refresh` picks up new ones."""

    def __init__(self, folder: Path, side: int) -> None:
        self.folder = folder
        self.side = side
        self._seen: set[Path] = set()
        self._shards: list[dict[str, Tensor]] = []
        self.scenes = 0

    def refresh(self) -> None:
        for path in sorted(self.folder.glob(f"latents-{self.side}-*.pt")):
            if path not in self._seen:
                shard: dict[str, Tensor] = torch.load(path, weights_only=True)
                self._seen.add(path)
                self._shards.append(shard)
                self.scenes += len(shard["masks"])

    def draw(self, rng: np.random.Generator, count: int, window: int) -> LatentBatch:
        """`count` random scenes, half of them mirrored, each with one of its things.

        A `window` (latents) smaller than the scene is cut out of it around the whole mask;
        scenes whose mask is larger are passed over.
        """
        rows: list[Tensor] = []
        masks: list[Tensor] = []
        things: list[Thing] = []
        while len(rows) < count:
            shard = self._shards[int(rng.integers(len(self._shards)))]
            index = int(rng.integers(len(shard["masks"])))
            mask = shard["masks"][index]
            cut = _window(mask, window, rng)
            if cut is None:
                continue
            which = int(rng.integers(shard["things"].shape[1]))
            row, mask = shard["latents"][index][[0, 1, 2 + which]][..., *cut], mask[cut]
            if rng.random() < 0.5:
                row, mask = row.flip(-1), mask.flip(-1)
            shape, colour = shard["things"][index, which].tolist()
            rows.append(row)
            masks.append(mask)
            things.append(Thing(_SHAPE_NAMES[shape], _COLOUR_NAMES[colour]))
        latents = torch.stack(rows).float()  # (n, 3, 4, window, window)
        stacked = torch.stack(masks)[:, None].float()
        return LatentBatch(latents[:, 0], latents[:, 2], latents[:, 1], stacked, things)


def _window(mask: Tensor, window: int, rng: np.random.Generator) -> tuple[slice, slice] | None:
    """A random square of the mask's plane that holds all of the mask, if there is one."""
    cuts = []
    for axis in (1, 0):
        used = mask.any(dim=axis).nonzero().flatten()
        lowest = max(0, int(used[-1]) + 1 - window)
        highest = min(int(used[0]), mask.shape[1 - axis] - window)
        if lowest > highest:
            return None
        start = int(rng.integers(lowest, highest + 1))
        cuts.append(slice(start, start + window))
    return cuts[0], cuts[1]
