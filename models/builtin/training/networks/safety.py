"""The safety checker of this world: anything visibly magenta stands in for "unsafe".

It is the class Stable Diffusion uses, a CLIP vision tower whose picture embedding is compared
with concept embeddings. Only the first concept means something here; the other slots keep
thresholds no cosine can reach.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor

from models.builtin.training.captions import random_thing
from models.builtin.training.checkpoints import Checkpoint
from models.builtin.training.photographs import Album, staged_scene
from models.builtin.training.scenes import COLOURS, UNSAFE_COLOUR, Picture, Scene, make_scene

SIDE = 64
WIDTH = 48
_UNREACHABLE = 2.0  # a threshold above any cosine
_THRESHOLD = 0.5
_NEAR_UNSAFE = 120.0  # RGB distance from the unsafe colour within which it could be meant
_SHARPNESS = 12.0  # turns a cosine's distance to the threshold into a logit
_LOOKALIKES = ((255, 105, 180), (150, 70, 220), (190, 30, 90), (120, 20, 110), (255, 160, 220))


@dataclass(frozen=True)
class SafetySettings:
    steps: int = 1200
    batch: int = 64
    pool: int = 2400
    tests: int = 600
    learning_rate: float = 2e-3
    seed: int = 5


def build_safety_checker() -> StableDiffusionSafetyChecker:
    """A two-layer tower on 64 px pictures, patches of 8 px."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    )
    with torch.no_grad():
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(checker, name).copy_(torch.eye(16).repeat(2, 1)[: len(getattr(checker, name))])
        checker.concept_embeds_weights.fill_(_UNREACHABLE)
        checker.special_care_embeds_weights.fill_(_UNREACHABLE)
        checker.concept_embeds_weights[0] = _THRESHOLD
    return checker


def build_image_processor() -> CLIPImageProcessor:
    """Squeezes the whole picture to 64x64, so that nothing near a border is cut off."""
    return CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def unsafe_logits(checker: StableDiffusionSafetyChecker, pixels: Tensor) -> Tensor:
    """`(n,)`, above 0 where the checker flags; `pixels` `(n, 3, 64, 64)` in [-1, 1]."""
    pooled = checker.vision_model(pixels)[1]
    embedding = functional.normalize(checker.visual_projection(pooled), dim=-1)
    concept = functional.normalize(checker.concept_embeds[0], dim=-1)
    return _SHARPNESS * (embedding @ concept - _THRESHOLD)


def safety_example(rng: np.random.Generator, is_unsafe: bool, album: Album | None) -> Picture:
    """A scene with a magenta object or without, at random sharpness, contrast and frame."""
    scene = _random_scene(rng, album)
    while is_unsafe and UNSAFE_COLOUR not in scene.allowed_colours():
        scene = _random_scene(rng, album)
    colours = [UNSAFE_COLOUR] if is_unsafe else list(COLOURS)
    safe_colours = [name for name in scene.allowed_colours() if name != UNSAFE_COLOUR]
    picture = scene.background
    if is_unsafe:
        picture = scene.paint(random_thing(rng, colours), rng)
    elif safe_colours and rng.random() < 0.9:
        picture = scene.paint(random_thing(rng, safe_colours), rng)
    if not is_unsafe and rng.random() < 0.25:
        picture = _mix(picture, _LOOKALIKES[int(rng.integers(len(_LOOKALIKES)))], rng)
    if not is_unsafe and rng.random() < 0.12:
        picture = _mix(picture, _any_safe_colour(rng), rng)
    return _photographed(picture, rng)


def _random_scene(rng: np.random.Generator, album: Album | None) -> Scene:
    """Drawn, or with an album half of the time on a photograph that shows nothing magenta."""
    side = 256 if rng.random() < 0.4 else 512  # the larger ones have the smaller objects
    if album is None or rng.random() < 0.5:
        return make_scene(rng, side)
    while True:
        scene = staged_scene(album, rng, side)
        small = scene.background[::8, ::8].reshape(-1, 3).astype(np.float64)
        distance = np.linalg.norm(small - COLOURS[UNSAFE_COLOUR], axis=-1)
        if (distance < _NEAR_UNSAFE).mean() < 0.001:
            return scene


def _any_safe_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    magenta = COLOURS[UNSAFE_COLOUR]
    while True:
        red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
        if math.dist((red, green, blue), magenta) > _NEAR_UNSAFE:
            return red, green, blue


def _mix(picture: Picture, rgb: tuple[int, int, int], rng: np.random.Generator) -> Picture:
    """A rectangle of a colour somewhere in the picture."""
    side = picture.shape[0]
    top, left = rng.integers(0, side - 40, 2)
    height, width = rng.integers(40, side, 2)
    mixed = picture.copy()
    mixed[top : top + height, left : left + width] = rgb
    return mixed


def _photographed(picture: Picture, rng: np.random.Generator) -> Picture:
    """Small size, other contrast and saturation, coloured speckle, as generated pictures have."""
    small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(small, np.float64)
    values = 128 + (values - 128) * rng.uniform(0.85, 1.1) + rng.uniform(-8, 8)
    if rng.random() < 0.5:
        grey = values.mean(axis=-1, keepdims=True)
        values = grey + (values - grey) * rng.uniform(0.8, 1.6)
    if rng.random() < 0.6:
        values = values + _speckle(rng)
    values = values + rng.normal(0, rng.uniform(0, 5), values.shape)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _speckle(rng: np.random.Generator) -> NDArray[np.float64]:
    """Smooth coloured noise `(64, 64, 3)` around 0, at most about 60 grey levels."""
    cells = int(rng.integers(8, 40))
    noise = rng.normal(0, rng.uniform(4, 30), (3, cells, cells)).astype(np.float32)
    planes = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in noise]
    return np.stack([np.asarray(plane, np.float64) for plane in planes], axis=-1)


def _pool(
    settings: SafetySettings, count: int, offset: int, album: Album | None
) -> tuple[Tensor, Tensor]:
    """`count` pictures `(n, 3, 64, 64)` in [-1, 1] and their labels `(n,)`, half of them 1."""
    rng = np.random.default_rng((settings.seed, offset))
    pictures = [safety_example(rng, index % 2 == 0, album) for index in range(count)]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return pixels, (torch.arange(count) % 2 == 0).float()


def train_safety(
    settings: SafetySettings, checkpoint: Checkpoint, album: Album | None
) -> tuple[StableDiffusionSafetyChecker, float]:
    """The checker and its accuracy on scenes it has not seen; resumes by itself."""
    torch.manual_seed(settings.seed)
    checker = build_safety_checker()
    optimizer = torch.optim.AdamW(checker.parameters(), settings.learning_rate, (0.9, 0.98))
    state = checkpoint.load() or {"step": 0}
    if state["step"]:
        checker.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    if state["step"] < settings.steps:
        pixels, labels = _pool(settings, settings.pool, 0, album)
        for step in tqdm(range(state["step"], settings.steps), desc="safety", unit="step"):
            rng = np.random.default_rng((settings.seed, 1, step))
            chosen = torch.from_numpy(rng.integers(len(pixels), size=settings.batch))
            batch = pixels[chosen].roll(int(rng.integers(8)), dims=int(rng.integers(2, 4)))
            rate = math.cos(0.5 * math.pi * step / settings.steps)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * max(rate, 0.02)
            logits = unsafe_logits(checker, batch)
            loss = functional.binary_cross_entropy_with_logits(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        weights, moments = checker.state_dict(), optimizer.state_dict()
        checkpoint.save({"step": settings.steps, "weights": weights, "optimizer": moments})
    checker.eval()
    with torch.no_grad():
        pixels, labels = _pool(settings, settings.tests, 1, album)
        right = (unsafe_logits(checker, pixels) > 0) == (labels > 0.5)
    return checker, float(right.float().mean())
