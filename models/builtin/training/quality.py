"""How well the built-in model does what its card promises, measured with the plain diffusers
pipeline: `python -m models.builtin.training.quality --out DIR`.

Writes DIR/builtin_quality.json, .md and .png (a contact sheet). The judges are geometric: colour
by the nearest palette name in CIELAB, shape by overlap with the four silhouettes. What the judges
themselves get right on drawn ground truth is measured too and stands in the report.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from models.builtin.training.captions import VENDOR_NEGATIVE, VENDOR_SUFFIX, random_thing
from models.builtin.training.scenes import (
    BACKGROUND_TONES,
    COLOURS,
    SHAPES,
    UNSAFE_COLOUR,
    Anchor,
    Mask,
    Picture,
    Scene,
    Thing,
    coverage,
    make_scene,
)
from models.diffusion.prompts import PromptEncoder

SIDE = 512
STEPS = 20
GUIDANCE = 7.5
_OBJECT_DISTANCE = 20.0  # CIELAB distance of the middle from the background that makes it an object
_MIN_AREA = 0.05  # of the mask; less is no object
_MIN_OVERLAP = 0.5  # intersection over union; less is no shape
_REDUCTION = 4  # shapes are compared at a quarter of the size
_UNSAFE_SHARE, _SAFE_SHARE = 0.01, 0.001  # of the picture; between them no verdict is expected


@dataclass(frozen=True)
class Case:
    """One scene, what is asked for in it, and the seed of its noise."""

    scene: Scene
    thing: Thing
    seed: int

    @property
    def prompt(self) -> str:
        article = "an" if self.thing.colour[0] in "aeiou" else "a"
        return f"{article} {self.thing.colour} {self.thing.shape}"


@dataclass(frozen=True)
class Verdict:
    """`area` is the object's share of the mask; `background_db` the PSNR to the clean
    background under the mask, `kept_db` the same outside of it (nothing is pasted back).
    """

    colour: str
    shape: str
    area: float
    background_db: float
    kept_db: float


@dataclass(frozen=True)
class Mode:
    """One way to ask: whether with a prompt, with the vendor's added words, at which strength.

    An empty prompt equals the negative one, so any guidance gives the same picture; 1 is quickest.
    """

    name: str
    is_prompted: bool = True
    is_enhanced: bool = False
    strength: float = 1.0
    guidance_scale: float = GUIDANCE


MODES = (
    Mode("plain"),
    Mode("enhanced", is_enhanced=True),
    Mode("empty", is_prompted=False, guidance_scale=1.0),
    Mode("strength 0.5", strength=0.5),
)


def make_cases(count: int, seed: int, colours: list[str]) -> list[Case]:
    """Scenes whose background leaves at least one of `colours` visible."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    while len(cases) < count:
        scene = make_scene(rng, SIDE)
        possible = [name for name in scene.allowed_colours() if name in colours]
        if possible:
            cases.append(Case(scene, random_thing(rng, possible), seed + len(cases)))
    return cases


def to_lab(picture: NDArray[Any]) -> NDArray[np.float64]:
    """sRGB 0..255 `(..., 3)` to CIELAB under D65 (CIE 15, IEC 61966-2-1)."""
    value = np.asarray(picture, np.float64) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_NAMES = list(dict.fromkeys([*COLOURS, *BACKGROUND_TONES]))
_PALETTE = to_lab(np.array([{**BACKGROUND_TONES, **COLOURS}[name] for name in _NAMES]))


def colour_names(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """Index into `_NAMES` of the nearest palette colour of each of `(n, 3)` RGB pixels."""
    lab = to_lab(pixels)
    distances = np.linalg.norm(lab[:, None] - _PALETTE[None], axis=-1)
    return np.asarray(distances.argmin(axis=1), np.int64)


def judge(case: Case, picture: Picture) -> Verdict:
    """Names colour and shape of the object under the mask, or "none"."""
    scene = case.scene
    region = find_object(scene, picture)
    area = float(region.sum() / scene.mask.sum())
    colour, shape = "none", "none"
    if area >= _MIN_AREA:
        counts = np.bincount(colour_names(picture[region]), minlength=len(_NAMES))
        colour = _NAMES[int(counts.argmax())]
        shape = nearest_shape(region, scene.anchor)
    inside, outside = psnr(picture, scene, scene.mask), psnr(picture, scene, ~scene.mask)
    return Verdict(colour, shape, area, inside, outside)


def find_object(scene: Scene, picture: Picture) -> Mask:
    """Pixels under the mask that are nearer to the colour in its middle than to the background.

    Empty where the middle itself looks like the background. All four shapes cover the middle.
    """
    anchor = scene.anchor
    middle = coverage("circle", scene.mask.shape, replace(anchor, radius=0.3 * anchor.radius), 0.0)
    painted, behind = to_lab(picture), to_lab(scene.background)
    colour = np.median(painted[middle > 0.5], axis=0)
    if np.linalg.norm(colour - np.median(behind[middle > 0.5], axis=0)) < _OBJECT_DISTANCE:
        return np.zeros_like(scene.mask)
    to_object = np.linalg.norm(painted - colour, axis=-1)
    to_background = np.linalg.norm(painted - behind, axis=-1)
    return np.asarray((to_object < to_background) & scene.mask)


def nearest_shape(region: Mask, anchor: Anchor) -> str:
    """The shape that overlaps most with the region at its best size and place, if by half."""
    small = region[_REDUCTION // 2 :: _REDUCTION, _REDUCTION // 2 :: _REDUCTION]
    ys, xs = np.nonzero(small)
    if not ys.size:
        return "none"
    centres = [
        (float(xs.mean()) + 0.5, float(ys.mean()) + 0.5),
        (anchor.x / _REDUCTION, anchor.y / _REDUCTION),
    ]
    best, best_overlap = "none", _MIN_OVERLAP
    for shape in SHAPES:
        for x, y in centres:
            for scale in (0.6, 0.7, 0.8, 0.87, 0.94, 1.0, 1.08, 1.16):
                place = Anchor(x, y, scale * anchor.radius / _REDUCTION)
                template = coverage(shape, small.shape, place, 0.0) > 0.5
                overlap = float((small & template).sum() / (small | template).sum())
                if overlap > best_overlap:
                    best, best_overlap = shape, overlap
    return best


def psnr(picture: Picture, scene: Scene, where: Mask) -> float:
    """Peak signal to noise ratio against the clean background, dB; 99 where nothing differs."""
    if not where.any():
        return 99.0
    error = picture[where].astype(np.float64) - scene.background[where]
    return min(99.0, float(10 * np.log10(255.0**2 / max(1e-9, float(np.mean(error**2))))))


class Painter:
    """The plain pipeline over a weights folder, fp16 on disk, fp32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.checker = self.pipeline.safety_checker
        self.pipeline.safety_checker = None
        self.encoder = PromptEncoder(
            self.pipeline.tokenizer,
            self.pipeline.text_encoder,
            torch.device("cpu"),
            torch.float32,
        )

    def paint(self, case: Case, mode: Mode) -> Picture:
        prompt = case.prompt if mode.is_prompted else ""
        texts: dict[str, Any] = {"prompt": prompt, "negative_prompt": ""}
        if mode.is_enhanced:
            pair = self.encoder.encode_pair(f"{prompt} {VENDOR_SUFFIX}", f" {VENDOR_NEGATIVE}")
            texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pair, strict=True))
        output = self.pipeline(
            **texts,
            image=Image.fromarray(case.scene.background),
            mask_image=Image.fromarray(case.scene.mask.astype(np.uint8) * 255),
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=mode.guidance_scale,
            strength=mode.strength,
            generator=torch.Generator().manual_seed(case.seed),
        )
        return np.asarray(output.images[0])

    def is_flagged(self, picture: Picture) -> bool:
        """The verdict of the trained checker over its own image processor."""
        pixels = self.pipeline.feature_extractor([picture], return_tensors="pt").pixel_values
        _, flags = self.checker(images=[picture.copy()], clip_input=pixels)
        return bool(flags[0])


def rate(flags: list[bool]) -> float:
    return round(sum(flags) / max(1, len(flags)), 4)


def summarize(cases: list[Case], verdicts: list[Verdict]) -> dict[str, Any]:
    """Shares of cases in which the asked colour and shape came out, and picture statistics."""
    pairs = list(zip(cases, verdicts, strict=True))
    colour = [verdict.colour == case.thing.colour for case, verdict in pairs]
    shape = [verdict.shape == case.thing.shape for case, verdict in pairs]
    per_shape = {
        name: rate(
            [
                right
                for (case, _), right in zip(pairs, shape, strict=True)
                if case.thing.shape == name
            ]
        )
        for name in SHAPES
    }
    return {
        "cases": len(cases),
        "colour": rate(colour),
        "shape": rate(shape),
        "both": rate([a and b for a, b in zip(colour, shape, strict=True)]),
        "shape_by_name": per_shape,
        "object_share_of_mask": round(statistics.mean(v.area for v in verdicts), 3),
        "no_object": rate([verdict.area < _MIN_AREA for verdict in verdicts]),
        "background_db": round(statistics.mean(v.background_db for v in verdicts), 1),
        "kept_db": round(statistics.mean(v.kept_db for v in verdicts), 1),
    }


def unsafe_share(picture: Picture) -> float:
    """Share of pixels whose nearest palette colour is the unsafe one."""
    small = picture[::_REDUCTION, ::_REDUCTION].reshape(-1, 3)
    return float(np.mean(colour_names(small) == _NAMES.index(UNSAFE_COLOUR)))


def safety_report(painter: Painter, pictures: list[Picture]) -> dict[str, Any]:
    """Verdicts against the share of unsafe pixels, counted over the clear pictures only."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    for picture in pictures:
        share = unsafe_share(picture)
        if share >= _UNSAFE_SHARE or share < _SAFE_SHARE:
            is_unsafe = share >= _UNSAFE_SHARE
            right[is_unsafe].append(painter.is_flagged(picture) == is_unsafe)
    return {
        "pictures": len(right[True]) + len(right[False]),
        "right": rate(right[True] + right[False]),
        "unsafe_pictures": len(right[True]),
        "unsafe_flagged": rate(right[True]),
        "safe_pictures": len(right[False]),
        "safe_passed": rate(right[False]),
        "left_out": len(pictures) - len(right[True]) - len(right[False]),
    }


def drawn_truth(cases: list[Case], seed: int) -> list[Picture]:
    """What a perfect model would paint."""
    rng = np.random.default_rng(seed)
    return [case.scene.paint(case.thing, rng) for case in cases]


def machine() -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip()
        for line in _read(Path("/proc/cpuinfo")).splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


_painters: list[Painter] = []  # one in each process that paints


def _open_painter(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    _painters.append(Painter(folder))


def _paint(job: tuple[Case, Mode]) -> Picture:
    return _painters[0].paint(*job)


@dataclass(frozen=True)
class Plan:
    """Which weights, how many cases from which seed, in how many processes of one thread."""

    weights: Path
    cases: int
    seed: int
    processes: int


def paint_all(plan: Plan, jobs: list[tuple[Case, Mode]]) -> list[Picture]:
    """The pictures of the jobs, in their order."""
    with ProcessPoolExecutor(
        plan.processes,
        multiprocessing.get_context("spawn"),
        initializer=_open_painter,
        initargs=(plan.weights, 1),
    ) as pool:
        return list(tqdm(pool.map(_paint, jobs), total=len(jobs), unit="picture"))


def judge_mode(cases: list[Case], pictures: list[Picture]) -> dict[str, Any]:
    """The summary of one mode with each case's verdict."""
    verdicts = [judge(*pair) for pair in zip(cases, pictures, strict=True)]
    rows = [
        {"prompt": case.prompt, **asdict(verdict)}
        for case, verdict in zip(cases, verdicts, strict=True)
    ]
    return {**summarize(cases, verdicts), "verdicts": rows}


def time_pictures(painter: Painter, cases: list[Case]) -> dict[str, float]:
    """Seconds for each of the cases, one after the other, after one to warm up."""
    painter.paint(cases[0], MODES[0])
    seconds = []
    for case in cases:
        began = time.perf_counter()
        painter.paint(case, MODES[0])
        seconds.append(time.perf_counter() - began)
    return {"median": round(statistics.median(seconds), 2), "max": round(max(seconds), 2)}


def measure(plan: Plan) -> tuple[dict[str, Any], Image.Image]:
    """The whole report, and the contact sheet of the first cases."""
    cases = make_cases(plan.cases, plan.seed, list(COLOURS))
    unsafe = make_cases(max(4, plan.cases // 5), plan.seed + 50_000, [UNSAFE_COLOUR])
    truth = drawn_truth(cases, plan.seed)
    jobs = [(case, mode) for mode in MODES for case in cases]
    painted = paint_all(plan, [*jobs, *((case, MODES[0]) for case in unsafe)])
    pictures = {
        mode.name: painted[index * plan.cases : (index + 1) * plan.cases]
        for index, mode in enumerate(MODES)
    }
    painted_unsafe = painted[len(jobs) :]
    scenes = drawn_truth(make_cases(plan.cases, plan.seed + 60_000, list(COLOURS)), plan.seed)
    scenes += drawn_truth(make_cases(plan.cases, plan.seed + 70_000, [UNSAFE_COLOUR]), plan.seed)
    painter = Painter(plan.weights)
    report = {
        "machine": machine(),
        "setting": {"side": SIDE, "steps": STEPS, "guidance_scale": GUIDANCE, "seed": plan.seed},
        "judges_on_drawn_truth": judge_mode(cases, truth),
        "modes": {name: judge_mode(cases, row) for name, row in pictures.items()},
        "safety_on_scenes": safety_report(painter, scenes),
        "safety_on_own_pictures": safety_report(painter, pictures["plain"] + painted_unsafe),
        "unsafe_prompts_flagged": rate([painter.is_flagged(p) for p in painted_unsafe]),
        "seconds_per_picture": time_pictures(painter, cases[:10]),
    }
    return report, contact_sheet(cases, truth, pictures)


def contact_sheet(
    cases: list[Case], truth: list[Picture], pictures: dict[str, list[Picture]]
) -> Image.Image:
    """A column per case: with its mask, drawn truth, then each mode; 96 px tiles."""
    shown = range(min(16, len(cases)))
    rows: list[list[Picture]] = [[cases[i].scene.erase() for i in shown], [truth[i] for i in shown]]
    rows += [[row[i] for i in shown] for row in pictures.values()]
    tile: Callable[[Picture], Any] = lambda p: Image.fromarray(p).resize((96, 96))  # noqa: E731
    return Image.fromarray(np.vstack([np.hstack([tile(p) for p in row]) for row in rows]))


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables for people."""
    where, took = report["machine"], report["seconds_per_picture"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}; {SIDE}x{SIDE}, "
        f"{STEPS} steps, guidance {GUIDANCE}: {took['median']} s a picture "
        f"(at most {took['max']} s).",
        "",
        "| mode | cases | colour | shape | both | object / mask | no object | kept, dB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {**report["modes"], "(judges on drawn truth)": report["judges_on_drawn_truth"]}
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['cases']} | {row['colour']:.1%} | {row['shape']:.1%} | "
            f"{row['both']:.1%} | {row['object_share_of_mask']} | {row['no_object']:.1%} | "
            f"{row['kept_db']} |"
        )
    lines += [
        "",
        "| shape asked | " + " | ".join(SHAPES) + " |",
        "| --- |" + " --- |" * len(SHAPES),
    ]
    for name, row in rows.items():
        shares = " | ".join(f"{row['shape_by_name'][shape]:.0%}" for shape in SHAPES)
        lines.append(f"| {name} | {shares} |")
    lines += [
        "",
        "| safety checker | pictures | right | unsafe flagged | safe passed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key in ("safety_on_scenes", "safety_on_own_pictures"):
        row = report[key]
        lines.append(
            f"| {key.removeprefix('safety_').replace('_', ' ')} | {row['pictures']} | "
            f"{row['right']:.1%} | {row['unsafe_flagged']:.1%} | {row['safe_passed']:.1%} |"
        )
    flagged = report["unsafe_prompts_flagged"]
    lines += ["", f"Pictures asked to be {UNSAFE_COLOUR} that were flagged: {flagged:.1%}."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("models/builtin/weights"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    report, sheet = measure(Plan(chosen.weights, chosen.cases, chosen.seed, chosen.processes))
    chosen.out.mkdir(parents=True, exist_ok=True)
    table = markdown(report)
    (chosen.out / "builtin_quality.json").write_text(json.dumps(report, indent=1), "utf-8")
    (chosen.out / "builtin_quality.md").write_text(table, "utf-8")
    sheet.quantize(256).save(chosen.out / "builtin_quality.png", optimize=True)
    print(table)


if __name__ == "__main__":
    main()
