"""Photographs in the built-in model's training: crops, masks, pairs of texts, and the yardstick."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.builtin_photographs import contact_sheet, fill_cases, judge_fill, shape_cases
from models.builtin.training.latents import LatentBatch, LatentStore
from models.builtin.training.lessons import draw_exercise, tempered, visibility
from models.builtin.training.masks import hand_mask
from models.builtin.training.networks.unet import build_scheduler
from models.builtin.training.networks.vae import texture_loss, to_tensor
from models.builtin.training.photographs import (
    Album,
    open_photograph,
    photographic_scene,
    read_manifest,
    staged_scene,
    texture,
)
from models.builtin.training.scenes import COLOURS, Scene, Thing, locate

SIDE = 256


def album() -> Album:
    """Two procedural pictures."""
    rng = np.random.default_rng(1)
    return Album([Image.fromarray(texture(rng, 300)) for _ in range(2)])


def test_manifest_names_author_licence_and_package_of_each_photograph() -> None:
    photographs = read_manifest()
    assert all(each.author and each.licence and each.package for each in photographs)
    assert len({(each.package, each.file) for each in photographs}) == len(photographs)
    assert sum(each.held_out for each in photographs) >= 12
    assert len({each.name for each in photographs}) == len(photographs)


def test_a_photograph_that_is_not_unpacked_is_named(tmp_path: Path) -> None:
    first = read_manifest()[0]
    with pytest.raises(FileNotFoundError, match=first.package):
        open_photograph(first, tmp_path)


def test_an_album_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Album([])


def test_crops_have_the_asked_side_and_depend_on_the_seed_only() -> None:
    pictures = album()
    first, again, other = (
        [pictures.crop(np.random.default_rng(seed), SIDE) for _ in range(1)][0]
        for seed in (3, 3, 4)
    )
    assert first.shape == (SIDE, SIDE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_some_crops_are_grey() -> None:
    pictures, rng = album(), np.random.default_rng(2)
    crops = [pictures.crop(rng, 64) for _ in range(60)]
    grey = [np.ptp(crop.astype(int), axis=-1).max() == 0 for crop in crops]
    assert 2 <= sum(grey) <= 25


def test_hand_masks_cover_part_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    areas = [hand_mask(rng, SIDE).mean() for _ in range(60)]
    assert 0.01 <= min(areas)
    assert max(areas) <= 0.5
    assert np.ptp(areas) > 0.2


def test_an_object_on_a_photograph_has_a_colour_that_stands_out() -> None:
    rng = np.random.default_rng(6)
    scene = staged_scene(album(), rng, SIDE)
    colours = scene.allowed_colours()
    assert scene.tones
    assert colours
    painted = scene.paint(Thing("circle", colours[0]), rng)
    x, y = int(scene.anchor.x), int(scene.anchor.y)
    assert np.abs(painted[y, x].astype(int) - COLOURS[colours[0]]).max() < 30


def test_texture_loss_sees_blur_and_no_shift() -> None:
    rng = np.random.default_rng(7)
    noise = to_tensor([rng.integers(0, 256, (64, 64, 3), np.uint8)])
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert texture_loss(noise, noise) == 0
    assert texture_loss(noise.roll(4, dims=3), noise) < 0.2 * texture_loss(blurred, noise)


@pytest.mark.parametrize("timestep", [999, 900, 500])
def test_the_second_half_of_a_pair_wants_no_object_where_none_can_be_seen(timestep: int) -> None:
    generator = torch.Generator().manual_seed(1)
    background = torch.randn(4, 4, 8, 8, generator=generator)
    painted = background + 1.0
    mask = torch.ones(4, 1, 8, 8)
    things: list[Thing | None] = [Thing("star", "red")] * 4
    batch = LatentBatch(background, painted, background, mask, things)
    timesteps = torch.full((4,), timestep)
    exercise = draw_exercise(batch, timesteps, np.random.default_rng(0), is_paired=True)
    assert len(exercise.texts) == 8
    assert torch.equal(exercise.noisy[:4], exercise.noisy[4:])
    alpha = build_scheduler().alphas_cumprod[timestep]
    clean = alpha.sqrt() * exercise.noisy - (1 - alpha).sqrt() * exercise.wanted
    first, second = clean[:4], clean[4:]
    if timestep >= 900:
        assert torch.allclose(second, background, atol=1e-3)
        assert (first - second).max() == pytest.approx(1.0, abs=1e-2)
    else:
        is_same = (first - second).flatten(1).abs().amax(dim=1) < 1e-3
        assert is_same.any()


def photographs(scales: list[float]) -> LatentBatch:
    """A row for each scale of detail, with a mask in the middle."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(len(scales), 4, 32, 32, generator=generator)
    latents = noise * torch.tensor(scales)[:, None, None, None]
    mask = torch.zeros(len(scales), 1, 32, 32)
    mask[:, :, 12:20, 12:20] = 1.0
    return LatentBatch(latents, latents, latents * (1 - mask), mask, [None] * len(scales))


def test_an_error_counts_more_where_the_surroundings_are_smooth() -> None:
    batch = photographs([0.1, 1.0])
    smooth, rough = visibility(batch).flatten().tolist()
    assert smooth > 3 * rough > 0


def test_what_is_in_the_mask_does_not_decide_what_an_error_counts() -> None:
    batch = photographs([0.1, 1.0])
    expected = visibility(batch)
    # The mean of detail reaches two latents beyond the mask.
    batch.background[:, :, 14:18, 14:18] += 5.0
    assert torch.equal(visibility(batch), expected)


def test_an_error_counts_once_where_a_thing_is_painted() -> None:
    batch = photographs([0.1])
    painted = dataclasses.replace(batch, things=[Thing("star", "red")])
    assert visibility(painted).item() == 1.0


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_tempered_photographs_lie_between_the_guess_and_the_real_ones(temperature: float) -> None:
    batch = photographs([0.1, 1.0])
    guess = torch.full_like(batch.background, 3.0)
    found = tempered(batch, guess, temperature)
    inside = batch.mask.expand_as(guess) > 0
    expected = 3.0 + temperature * (batch.background[inside] - 3.0)
    torch.testing.assert_close(found.background[inside], expected)
    assert torch.equal(found.background[~inside], batch.background[~inside])
    assert torch.equal(found.background, found.painted)
    assert torch.equal(found.masked, batch.masked)


def test_a_store_without_shards_says_which_are_missing(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, "staged", 512)
    store.refresh()
    with pytest.raises(ValueError, match="no staged of 512 px"):
        store.draw(np.random.default_rng(0), 1, 64)


def photographic_case() -> Scene:
    return photographic_scene(album(), np.random.default_rng(8), SIDE)


def test_the_photograph_itself_is_a_perfect_fill() -> None:
    scene = photographic_case()
    fill = judge_fill(scene, scene.background)
    assert fill.colour == 0
    assert fill.psnr_db > 90
    assert fill.seam == pytest.approx(1.0)


def test_a_flat_fill_lacks_texture_and_a_bright_one_has_a_seam() -> None:
    scene = photographic_case()
    mean = scene.background[scene.mask].mean(axis=0)
    flat = np.broadcast_to(mean, scene.background.shape).astype(np.uint8)
    bright = np.minimum(scene.background.astype(int) + 60, 255).astype(np.uint8)
    assert judge_fill(scene, flat).texture < 0.2
    assert judge_fill(scene, bright).seam > 1.5
    assert judge_fill(scene, bright).colour > judge_fill(scene, flat).colour


def test_cases_and_contact_sheet_cover_every_photograph() -> None:
    rng = np.random.default_rng(9)
    squares = {name: Image.fromarray(texture(rng, 512)) for name in ("first", "second")}
    cases = fill_cases(squares, 2, 1)
    assert len(cases) == 4
    assert not np.array_equal(cases[0].scene.mask, cases[2].scene.mask)
    shapes = shape_cases(Album(list(squares.values())), 2, 1, list(COLOURS))
    assert [locate(case.scene.mask) == case.scene.anchor for case in shapes] == [True, True]
    sheet = contact_sheet(cases, {"same": [case.scene.background for case in cases]}, range(4))
    assert sheet.size == (4 * 128, 3 * 128)
