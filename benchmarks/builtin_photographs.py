"""What the built-in model makes of photographs, beside OpenCV's two classical methods and an older
model: `python -m benchmarks.builtin_photographs --photographs ROOT --out DIR`.

The photographs are those of the manifest that training held out. First each of them is continued
under masks as people paint them, with an empty prompt; then coloured shapes are asked for on them.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.report import write_report
from models.builtin.training.captions import random_thing
from models.builtin.training.masks import hand_mask
from models.builtin.training.photographs import (
    Album,
    open_photograph,
    read_manifest,
    staged_scene,
)
from models.builtin.training.quality import (
    MODES,
    SIDE,
    Case,
    Mode,
    Painter,
    Plan,
    drawn_truth,
    find_object,
    judge_mode,
    machine,
    paint_all,
    rate,
    safety_report,
    time_pictures,
)
from models.builtin.training.scenes import (
    COLOURS,
    UNSAFE_COLOUR,
    Mask,
    Picture,
    Scene,
    Thing,
    locate,
)

EMPTY = Mode("empty", is_prompted=False, guidance_scale=1.0)
ENHANCED_EMPTY = Mode("empty, enhanced", is_prompted=False, is_enhanced=True)
THIS, OLDER = "this model", "older model"
_BLUR_PX = 12.0  # colours are compared after this Gaussian, within the mask
_RING_PX = 32  # the surroundings whose texture the fill is compared with
_SEAM_LIMIT, _TEXTURE_FACTOR = 1.5, 2.0
_TILE_PX = 128
_WHEREVER = Thing("circle", "red")  # what an empty prompt does not ask for


@dataclass(frozen=True)
class Fill:
    """One fill against the photograph, inside the mask.

    `colour` is the mean distance of blurred colours, 0..441; `texture` the strength of the fill's
    gradients over that of the ring around it, `seam` that of the gradient across the mask's edge
    over the photograph's own there.
    """

    colour: float
    psnr_db: float
    texture: float
    seam: float


def judge_fill(scene: Scene, picture: Picture) -> Fill:
    """Scores what a method put under the mask; what it did elsewhere is pasted over."""
    mask = scene.mask
    truth = scene.background.astype(np.float64)
    filled = np.where(mask[..., None], picture, scene.background).astype(np.float64)
    error = filled[mask] - truth[mask]
    smooth_error = _blur_within(filled - truth, mask)[mask]
    ring = _grown(mask, _RING_PX) & ~_grown(mask, 2)
    inner = ~_grown(~mask, 2)
    return Fill(
        colour=float(np.linalg.norm(smooth_error, axis=-1).mean()),
        psnr_db=float(10 * np.log10(255.0**2 / max(1e-9, float(np.mean(error**2))))),
        texture=_strength(filled, inner) / max(0.3, _strength(truth, ring)),
        seam=_edge_strength(filled, mask) / max(0.3, _edge_strength(truth, mask)),
    )


def _blur_within(values: NDArray[np.float64], mask: Mask) -> NDArray[np.float64]:
    """A Gaussian blur of `(h, w, 3)` that takes in pixels of the mask only."""
    weight = mask.astype(np.float64)
    share = cv2.GaussianBlur(weight, (0, 0), _BLUR_PX)
    blurred = cv2.GaussianBlur(values * weight[..., None], (0, 0), _BLUR_PX)
    return np.asarray(blurred / np.maximum(share, 1e-6)[..., None])


def _grown(mask: Mask, pixels: int) -> Mask:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


def _strength(picture: NDArray[np.float64], where: Mask) -> float:
    """Mean absolute difference of neighbours, both of which lie in `where`."""
    down = np.abs(np.diff(picture, axis=0)).mean(axis=-1)[where[1:] & where[:-1]]
    across = np.abs(np.diff(picture, axis=1)).mean(axis=-1)[where[:, 1:] & where[:, :-1]]
    return float(np.concatenate([down, across]).mean()) if down.size + across.size else 0.0


def _edge_strength(picture: NDArray[np.float64], mask: Mask) -> float:
    """Mean absolute difference of neighbours of which one lies in the mask."""
    down = np.abs(np.diff(picture, axis=0)).mean(axis=-1)[mask[1:] != mask[:-1]]
    across = np.abs(np.diff(picture, axis=1)).mean(axis=-1)[mask[:, 1:] != mask[:, :-1]]
    return float(np.concatenate([down, across]).mean())


def held_out_squares(root: Path) -> dict[str, Image.Image]:
    """The middle square of each held-out photograph, 512 px, by name."""
    squares = {}
    for photograph in (each for each in read_manifest() if each.held_out):
        picture = open_photograph(photograph, root)
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        box = (left, top, left + edge, top + edge)
        squares[photograph.name] = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
    return squares


def fill_cases(squares: dict[str, Image.Image], masks: int, seed: int) -> list[Case]:
    """Each photograph under that many random masks, in rounds over all photographs."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    for _ in range(masks):
        for square in squares.values():
            mask = hand_mask(rng, SIDE)
            scene = Scene(np.asarray(square), mask, locate(mask), (), "photograph")
            cases.append(Case(scene, _WHEREVER, seed + len(cases)))
    return cases


def shape_cases(album: Album, count: int, seed: int, colours: list[str]) -> list[Case]:
    """Crops of photographs that leave one of `colours` visible, and a thing in it to ask for."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    while len(cases) < count:
        scene = staged_scene(album, rng, SIDE)
        possible = [name for name in scene.allowed_colours() if name in colours]
        if possible:
            cases.append(Case(scene, random_thing(rng, possible), seed + len(cases)))
    return cases


def inpaint_classically(method: int) -> Callable[[Case], Picture]:
    """One of OpenCV's methods, over a radius of 5 px."""

    def fill(case: Case) -> Picture:
        mask = case.scene.mask.astype(np.uint8) * 255
        return np.asarray(cv2.inpaint(case.scene.background, mask, 5, method), np.uint8)

    return fill


CLASSICAL = {
    "Telea": inpaint_classically(cv2.INPAINT_TELEA),
    "Navier-Stokes": inpaint_classically(cv2.INPAINT_NS),
}


def summarize_fills(fills: list[Fill]) -> dict[str, Any]:
    """Means of errors, medians of ratios, and how many fills keep within the limits."""
    is_textured = [1 / _TEXTURE_FACTOR <= fill.texture <= _TEXTURE_FACTOR for fill in fills]
    return {
        "cases": len(fills),
        "colour": round(statistics.mean(fill.colour for fill in fills), 1),
        "psnr_db": round(statistics.mean(fill.psnr_db for fill in fills), 2),
        "texture": round(statistics.median(fill.texture for fill in fills), 2),
        "texture_within_factor_2": rate(is_textured),
        "seam": round(statistics.median(fill.seam for fill in fills), 2),
        "seamless": rate([fill.seam <= _SEAM_LIMIT for fill in fills]),
        "fills": [asdict(fill) for fill in fills],
    }


def background_colour(cases: list[Case], pictures: list[Picture]) -> float:
    """Mean colour error under the mask outside of the object that was painted there."""
    errors = []
    for case, picture in zip(cases, pictures, strict=True):
        around = case.scene.mask & ~_grown(find_object(case.scene, picture), 12)
        if around.any():
            difference = picture.astype(np.float64) - case.scene.background
            blurred = _blur_within(difference, around)[around]
            errors.append(float(np.linalg.norm(blurred, axis=-1).mean()))
    return round(statistics.mean(errors), 1) if errors else 0.0


def measure_fills(
    cases: list[Case], plans: dict[str, Plan]
) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
    """Scores of every method, and its pictures with the kept pixels pasted back."""
    pictures = {name: [fill(case) for case in cases] for name, fill in CLASSICAL.items()}
    for name, plan in plans.items():
        for mode in (EMPTY, ENHANCED_EMPTY)[: _modes_of(name)]:
            pictures[f"{name}, {mode.name}"] = paint_all(plan, [(case, mode) for case in cases])
    scores = {
        name: summarize_fills(
            [judge_fill(case.scene, picture) for case, picture in zip(cases, row, strict=True)]
        )
        for name, row in pictures.items()
    }
    return scores, {name: _pasted(cases, row) for name, row in pictures.items()}


def _modes_of(name: str) -> int:
    """An older model is asked in one way only, to save time."""
    return 2 if name == THIS else 1


def measure_shapes(
    cases: list[Case], plans: dict[str, Plan]
) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
    """Whether asked shapes come out on photographs, plain and with the vendor's added words."""
    scores: dict[str, Any] = {}
    pictures: dict[str, list[Picture]] = {}
    for name, plan in plans.items():
        for mode in MODES[: _modes_of(name)]:
            key = f"{name}, {mode.name}"
            row = paint_all(plan, [(case, mode) for case in cases])
            background = background_colour(cases, row)
            scores[key] = {**judge_mode(cases, row), "background_colour": background}
            pictures[key] = _pasted(cases, row)
    return scores, pictures


def _pasted(cases: list[Case], pictures: list[Picture]) -> list[Picture]:
    return [
        np.where(case.scene.mask[..., None], picture, case.scene.background)
        for case, picture in zip(cases, pictures, strict=True)
    ]


def contact_sheet(cases: list[Case], rows: dict[str, list[Picture]], shown: range) -> Image.Image:
    """A column per case: under its mask, the photograph, then a row for each method."""
    lines = [[cases[i].scene.erase() for i in shown], [cases[i].scene.background for i in shown]]
    lines += [[row[i] for i in shown] for row in rows.values()]
    size = (_TILE_PX, _TILE_PX)
    tiles = [
        np.hstack([np.asarray(Image.fromarray(picture).resize(size)) for picture in line])
        for line in lines
    ]
    return Image.fromarray(np.vstack(tiles))


def measure_safety(weights: Path, album: Album, count: int, seed: int) -> dict[str, Any]:
    """The checker on drawn truth over photographs, half of it magenta."""
    safe = [name for name in COLOURS if name != UNSAFE_COLOUR]
    cases = shape_cases(album, count, seed, safe)
    cases += shape_cases(album, count, seed + 1, [UNSAFE_COLOUR])
    return safety_report(Painter(weights), drawn_truth(cases, seed))


def measure(
    plans: dict[str, Plan], squares: dict[str, Image.Image], masks: int
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """The whole report, and the contact sheets by what their file's name ends in."""
    plan, album = plans[THIS], Album(list(squares.values()))
    cases = fill_cases(squares, masks, plan.seed)
    fills, filled = measure_fills(cases, plans)
    staged = shape_cases(album, plan.cases, plan.seed, list(COLOURS))
    shapes, painted = measure_shapes(staged, plans)
    report = {
        "machine": machine(),
        "fills": fills,
        "shapes": shapes,
        "safety": measure_safety(plan.weights, album, plan.cases, plan.seed),
        "seconds_per_picture": time_pictures(Painter(plan.weights), staged[:5]),
    }
    sheets = {
        "": contact_sheet(cases, filled, range(min(15, len(cases)))),
        "_shapes": contact_sheet(staged, painted, range(min(15, len(staged)))),
    }
    return report, sheets


def markdown(report: dict[str, Any]) -> str:
    """The report as tables for people."""
    where, took = report["machine"], report["seconds_per_picture"]
    lines = [
        "# The built-in model on photographs",
        "",
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}; {SIDE}x{SIDE}, 20 steps: "
        f"{took['median']} s a picture (at most {took['max']} s).",
        "",
        "| empty prompt | cases | colour error | PSNR, dB | texture | within a factor of 2 "
        "| seam | seamless |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["fills"].items():
        lines.append(
            f"| {name} | {row['cases']} | {row['colour']} | {row['psnr_db']} | {row['texture']} | "
            f"{row['texture_within_factor_2']:.0%} | {row['seam']} | {row['seamless']:.0%} |"
        )
    lines += [
        "",
        "| shapes on photographs | cases | colour | shape | both | background's colour error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["shapes"].items():
        lines.append(
            f"| {name} | {row['cases']} | {row['colour']:.0%} | {row['shape']:.0%} | "
            f"{row['both']:.0%} | {row['background_colour']} |"
        )
    safety = report["safety"]
    lines += [
        "",
        f"Safety checker on {safety['pictures']} photographs with shapes: {safety['right']:.1%} "
        f"right, {safety['unsafe_flagged']:.1%} of the unsafe flagged, "
        f"{safety['safe_passed']:.1%} of the safe passed.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("models/builtin/weights"))
    parser.add_argument("--older", type=Path, help="weights of an older model to compare with")
    parser.add_argument("--photographs", type=Path, required=True, help="unpacked Debian packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--masks", type=int, default=4, help="for each photograph")
    parser.add_argument("--shapes", type=int, default=60, help="cases with a prompt")
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    folders = {THIS: chosen.weights}
    if chosen.older is not None:
        folders = {OLDER: chosen.older, **folders}
    plans = {
        name: Plan(folder, chosen.shapes, chosen.seed, chosen.processes)
        for name, folder in folders.items()
    }
    report, sheets = measure(plans, held_out_squares(chosen.photographs), chosen.masks)
    write_report(chosen.out, "builtin_photographs", report, markdown(report))
    for name, sheet in sheets.items():
        sheet.quantize(256).save(chosen.out / f"builtin_photographs{name}.png", optimize=True)


if __name__ == "__main__":
    main()
