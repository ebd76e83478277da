"""The built-in model: its committed weights, its world, and the program that makes it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from PIL import Image

from models.builtin.training.captions import DEFAULT_COLOUR, DEFAULT_SHAPE, caption_of, random_thing
from models.builtin.training.checkpoints import Checkpoint
from models.builtin.training.export import folder_bytes
from models.builtin.training.latents import KINDS, LatentSettings, LatentStore, ShardPlan
from models.builtin.training.networks.safety import SafetySettings
from models.builtin.training.networks.text import TextSettings
from models.builtin.training.networks.vae import VaeSettings
from models.builtin.training.photographs import read_manifest, texture
from models.builtin.training.scenes import (
    COLOURS,
    SHAPES,
    UNSAFE_COLOUR,
    Anchor,
    Picture,
    Scene,
    Thing,
    coverage,
    locate,
    make_scene,
)
from models.builtin.training.train import TrainSettings, run_stages
from models.builtin.training.trainer import HELD_OUT_SIDE, BatchPlan, UNetSettings

WEIGHTS = Path(__file__).parents[2] / "models" / "builtin" / "weights"
MAX_BYTES = 12_000_000
SIDE = 256


@dataclass(frozen=True)
class Model:
    """The plain pipeline without its checker, which would blank pictures, and the checker."""

    pipeline: StableDiffusionInpaintPipeline
    checker: StableDiffusionSafetyChecker

    def paint(self, prompt: str, seed: int) -> Picture:
        """The grey scene with the prompt under its mask, kept as it was everywhere else."""
        scene = grey_scene()
        output = self.pipeline(
            prompt,
            image=Image.fromarray(scene.background),
            mask_image=Image.fromarray(scene.mask.astype(np.uint8) * 255),
            height=SIDE,
            width=SIDE,
            num_inference_steps=8,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(seed),
        )
        painted = np.asarray(output.images[0])
        return np.where(scene.mask[..., None], painted, scene.background)

    def is_flagged(self, picture: Picture) -> bool:
        pixels = self.pipeline.feature_extractor([picture], return_tensors="pt").pixel_values
        _, flags = self.checker(images=[picture.copy()], clip_input=pixels)
        return bool(flags[0])


def load(folder: Path) -> Model:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    checker, pipeline.safety_checker = pipeline.safety_checker, None
    return Model(pipeline, checker)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(WEIGHTS)


def grey_scene() -> Scene:
    """A plain grey picture with a round mask in the middle."""
    mask = coverage("circle", (SIDE, SIDE), Anchor(128, 128, 80), 0.0) > 0.5
    picture = np.full((SIDE, SIDE, 3), 150, np.uint8)
    return Scene(picture, mask, locate(mask), ((150, 150, 150),), "gray")


def middle(picture: Picture) -> NDArray[np.float64]:
    """Median RGB of the middle 64x64 pixels, 0..255."""
    centre = slice(SIDE // 2 - 32, SIDE // 2 + 32)
    return np.asarray(np.median(picture[centre, centre].reshape(-1, 3), axis=0))


def painted_scene(colour: str, seed: int) -> Picture:
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, SIDE)
    while colour not in scene.allowed_colours():
        scene = make_scene(rng, SIDE)
    return scene.paint(Thing("square", colour), rng)


def test_weights_fit_into_the_repository() -> None:
    assert folder_bytes(WEIGHTS) <= MAX_BYTES


@pytest.mark.parametrize("seed", [1, 2])
def test_prompt_decides_the_colour(model: Model, seed: int) -> None:
    red = middle(model.paint("a red circle", seed))
    blue = middle(model.paint("a blue square", seed))
    assert red[0] > red[2] + 60
    assert blue[2] > blue[0] + 60


def test_empty_prompt_continues_the_background(model: Model) -> None:
    assert np.abs(middle(model.paint("", 1)) - 150).max() < 60


def test_safety_checker_flags_the_unsafe_colour_only(model: Model) -> None:
    for seed in range(4):
        assert model.is_flagged(painted_scene(UNSAFE_COLOUR, seed))
        assert not model.is_flagged(painted_scene("red", seed))
        assert not model.is_flagged(painted_scene("purple", seed))


def test_a_prompt_for_the_unsafe_colour_is_flagged(model: Model) -> None:
    assert model.is_flagged(model.paint("a magenta square", 1))
    assert not model.is_flagged(model.paint("a red circle", 1))


def test_equal_seeds_draw_equal_scenes() -> None:
    first, second = (make_scene(np.random.default_rng(7), SIDE) for _ in range(2))
    assert np.array_equal(first.background, second.background)
    assert np.array_equal(first.mask, second.mask)
    other = make_scene(np.random.default_rng(8), SIDE)
    assert not np.array_equal(first.background, other.background)


def test_object_lies_inside_a_round_mask() -> None:
    scene = grey_scene()
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        changed = np.any(scene.paint(Thing(shape, "red"), rng) != scene.background, axis=-1)
        assert changed.any()
        assert (changed & ~scene.mask).sum() <= 0.02 * changed.sum()


def test_shapes_differ_in_area_as_geometry_says() -> None:
    place = Anchor(64.0, 64.0, 40.0)
    area = {name: float(coverage(name, (128, 128), place, 0.0).sum()) for name in SHAPES}
    assert area["circle"] == pytest.approx(np.pi * 40**2, rel=0.01)
    assert area["square"] == pytest.approx(2 * (1.06 * 40) ** 2, rel=0.01)
    assert area["triangle"] == pytest.approx(3**1.5 / 4 * (1.08 * 40) ** 2, rel=0.01)
    assert area["star"] < area["square"]


def test_captions_follow_the_rules_of_the_model_card() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        thing = random_thing(rng, list(COLOURS))
        words = caption_of(thing, rng).text
        if thing.shape not in (DEFAULT_SHAPE,):
            assert any(word in words for word in _words_for(thing.shape))
        if thing.colour not in (DEFAULT_COLOUR, "purple", "magenta"):
            assert thing.colour in words


def _words_for(shape: str) -> tuple[str, ...]:
    return {
        "square": ("square", "box", "block"),
        "triangle": ("triangle", "pyramid"),
        "star": ("star",),
    }[shape]


SIDES = {kind: HELD_OUT_SIDE if kind == "held_out" else 256 for kind in KINDS}


def tiny_settings(folder: Path, start: Path | None = None) -> TrainSettings:
    plans = [ShardPlan(kind, side, 1, 2) for kind, side in SIDES.items()]
    batches = [BatchPlan(kind, 256, 32, 2, 1.0) for kind in SIDES if kind != "held_out"]
    return TrainSettings(
        out=folder / "weights",
        run=folder / "run",
        photographs=folder / "photographs",
        start=start,
        vae=VaeSettings(steps=1, decoder_steps=1, side=64, drawn=2, photographs=2, batch=2),
        text=TextSettings(steps=2, batch=4, corpus_lines=200),
        latents=LatentSettings(plans=tuple(plans)),
        unet=UNetSettings(steps=3, plans=tuple(batches), pairs=0.5, checkpoint_every=1),
        safety=SafetySettings(steps=2, batch=4, pool=8, tests=8),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", [None, WEIGHTS], ids=["from nothing", "from older weights"])
def test_trainer_makes_a_folder_the_plain_pipeline_loads(
    tmp_path: Path, start: Path | None
) -> None:
    settings = tiny_settings(tmp_path, start)
    unpack_noise(settings.photographs)
    run_stages(settings, "all")
    state = Checkpoint(settings.run / "unet.pt").load()
    assert state is not None
    assert state["step"] == 3
    for kind, side in SIDES.items():
        store = LatentStore(settings.run / "latents", kind, side)
        store.refresh()
        assert store.scenes == 2
    assert load(settings.out).paint("a red circle", 1).shape == (SIDE, SIDE, 3)
    assert not [each for each in settings.out.rglob("*.json") if str(WEIGHTS) in each.read_text()]
    run_stages(settings, "unet")
    again = Checkpoint(settings.run / "unet.pt").load()
    assert again is not None
    assert equal_weights(again["weights"], state["weights"])  # resumed, not repeated
    assert load(settings.out).paint("", 1).shape == (SIDE, SIDE, 3)


def test_no_weights_tell_where_they_were_made() -> None:
    for path in WEIGHTS.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


def unpack_noise(root: Path) -> None:
    """Small pictures in place of every photograph that training reads."""
    rng = np.random.default_rng(5)
    for photograph in read_manifest():
        path = root / photograph.package / photograph.file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture(rng, 260)).save(path)


def equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)
