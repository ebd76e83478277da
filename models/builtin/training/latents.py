"""Scenes encoded once by the frozen autoencoder, in shards on disk, and batches drawn from them.

There are three kinds of scenes to train on: "drawn" ones, "staged" ones (objects on photographs)
and "photographs" with a mask and no object. Those of "held_out" photographs tell what was learnt,
and what was only learnt by heart. A shard is seeded by its kind, size and number, so any process
can make any of them, in any order.
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
from models.builtin.training.photographs import Album, photographic_scene, staged_scene
from models.builtin.training.scenes import COLOURS, SHAPES, Picture, Scene, Thing, make_scene

FACTOR = 8  # pixels per latent
KINDS = ("drawn", "staged", "photographs", "held_out")
THINGS_PER_SCENE = 2
_COLOUR_NAMES = list(COLOURS)
_SHAPE_NAMES = list(SHAPES)


@dataclass(frozen=True)
class ShardPlan:
    """How many shards of how many scenes there are of one of `KINDS` and a size (px)."""

    kind: str
    side: int
    shards: int
    scenes: int


@dataclass(frozen=True)
class LatentSettings:
    plans: tuple[ShardPlan, ...] = (
        ShardPlan("photographs", 256, 480, 32),
        ShardPlan("photographs", 512, 640, 8),
        ShardPlan("drawn", 256, 24, 32),
        ShardPlan("drawn", 512, 40, 8),
        ShardPlan("staged", 256, 24, 32),
        ShardPlan("staged", 512, 40, 8),
        ShardPlan("held_out", 512, 4, 8),
    )
    use_bfloat16: bool = False
    seed: int = 3


@dataclass(frozen=True)
class LatentBatch:
    """Latents `(n, 4, h, w)` of normalised scale; `mask` `(n, 1, h, w)` in {0, 1}.

    Without a thing the painted picture is the background.
    """

    background: Tensor
    painted: Tensor
    masked: Tensor
    mask: Tensor
    things: list[Thing | None]


def shard_path(folder: Path, kind: str, side: int, index: int) -> Path:
    return folder / f"{kind}-{side}-{index:04d}.pt"


class ShardMaker:
    """Encodes scenes; needs `album` for photographs to train on and `held_out` for the others."""

    def __init__(
        self,
        vae: AutoencoderKL,
        settings: LatentSettings,
        album: Album | None = None,
        held_out: Album | None = None,
    ) -> None:
        self.vae = vae.to(memory_format=torch.channels_last)
        self.album, self.held_out = album, held_out
        self.settings = settings

    def make(self, folder: Path, part: tuple[int, int]) -> Iterator[Path]:
        """Writes the missing shards of `part` = (which, of how many); yields each path when there.

        The kinds take turns, so that training can begin on the first shards of each.
        """
        most = max(plan.shards for plan in self.settings.plans)
        for index in range(part[0], most, part[1]):
            for plan in self.settings.plans:
                path = shard_path(folder, plan.kind, plan.side, index)
                if index < plan.shards and not path.exists():
                    Checkpoint(path).save(self._encode_scenes(plan, index))
                    yield path

    def _encode_scenes(self, plan: ShardPlan, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.settings.seed, KINDS.index(plan.kind), plan.side, index))
        latents: list[Tensor] = []
        masks: list[Tensor] = []
        things: list[list[tuple[int, int]]] = []
        while len(latents) < plan.scenes:
            scene = self._scene(plan, rng)
            chosen = _things_of(scene, plan.kind, rng)
            if chosen is None:
                continue
            pictures: list[Picture] = [scene.background, scene.erase()]
            pictures += [scene.paint(thing, rng) for thing in chosen]
            latents.append(self._encode(pictures))
            masks.append(torch.from_numpy(scene.mask[::FACTOR, ::FACTOR].copy()))
            things.append([thing_ids(thing) for thing in chosen])
        return {
            "latents": torch.stack(latents),  # (scenes, 2 + things, 4, h, w)
            "masks": torch.stack(masks),  # (scenes, h, w)
            "things": torch.tensor(things),  # (scenes, things, 2)
        }

    def _scene(self, plan: ShardPlan, rng: np.random.Generator) -> Scene:
        if plan.kind == "drawn":
            return make_scene(rng, plan.side)
        album = self.held_out if plan.kind == "held_out" else self.album
        if album is None:
            raise ValueError(f"scenes of the kind {plan.kind} need photographs")
        make = staged_scene if plan.kind == "staged" else photographic_scene
        return make(album, rng, plan.side)

    def _encode(self, pictures: list[Picture]) -> Tensor:
        device = next(self.vae.parameters()).device
        pixels = to_tensor(pictures).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, self.settings.use_bfloat16):
            return encode(self.vae, pixels).half().cpu()


def _things_of(scene: Scene, kind: str, rng: np.random.Generator) -> list[Thing] | None:
    """What is painted in the scene, one picture each; None where no colour would be seen."""
    if kind in ("photographs", "held_out"):
        return []
    colours = scene.allowed_colours()
    return [random_thing(rng, colours) for _ in range(THINGS_PER_SCENE)] if colours else None


def thing_ids(thing: Thing) -> tuple[int, int]:
    return _SHAPE_NAMES.index(thing.shape), _COLOUR_NAMES.index(thing.colour)


class LatentStore:
    """All shards of one kind and size found in a folder; `refresh` picks up new ones."""

    def __init__(self, folder: Path, kind: str, side: int) -> None:
        self.folder = folder
        self.kind = kind
        self.side = side
        self._seen: set[Path] = set()
        self._shards: list[dict[str, Tensor]] = []
        self.scenes = 0

    def refresh(self) -> None:
        for path in sorted(self.folder.glob(f"{self.kind}-{self.side}-*.pt")):
            if path not in self._seen:
                shard: dict[str, Tensor] = torch.load(path, weights_only=True)
                self._seen.add(path)
                self._shards.append(shard)
                self.scenes += len(shard["masks"])

    def draw(self, rng: np.random.Generator, count: int, window: int) -> LatentBatch:
        """`count` random scenes, half of them mirrored, each with one of its things if it has any.

        A `window` (latents) smaller than the scene is cut out of it around the whole mask;
        scenes whose mask is larger are passed over. Raises `ValueError` before there is a shard.
        """
        if not self._shards:
            raise ValueError(f"no {self.kind} of {self.side} px in {self.folder}")
        rows: list[Tensor] = []
        masks: list[Tensor] = []
        things: list[Thing | None] = []
        while len(rows) < count:
            shard = self._shards[int(rng.integers(len(self._shards)))]
            index = int(rng.integers(len(shard["masks"])))
            mask = shard["masks"][index]
            cut = _window(mask, window, rng)
            if cut is None:
                continue
            planes, thing = _pick_thing(shard, index, rng)
            row, mask = shard["latents"][index][planes][..., *cut], mask[cut]
            if rng.random() < 0.5:
                row, mask = row.flip(-1), mask.flip(-1)
            rows.append(row)
            masks.append(mask)
            things.append(thing)
        latents = torch.stack(rows).float()  # (n, 3, 4, window, window)
        stacked = torch.stack(masks)[:, None].float()
        return LatentBatch(latents[:, 0], latents[:, 2], latents[:, 1], stacked, things)


def _pick_thing(
    shard: dict[str, Tensor], index: int, rng: np.random.Generator
) -> tuple[list[int], Thing | None]:
    """Which planes of a scene are background, erased and painted picture, and what is painted."""
    count = shard["latents"].shape[1] - 2
    if count == 0:
        return [0, 1, 0], None
    which = int(rng.integers(count))
    shape, colour = shard["things"][index, which].tolist()
    return [0, 1, 2 + which], Thing(_SHAPE_NAMES[shape], _COLOUR_NAMES[colour])


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
