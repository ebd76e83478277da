"""The built-in model's world: textured backgrounds, masks, and one flat coloured shape per mask.

Everything is drawn with numpy from a generator passed in, so equal seeds give equal pictures.
Captions are in `captions`; nothing here knows about neural networks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Rgb = tuple[int, int, int]
Plane = NDArray[np.float32]  # (h, w)
Picture = NDArray[np.uint8]  # (h, w, 3) RGB, 0..255
Mask = NDArray[np.bool_]  # (h, w), true = repaint

COLOURS: dict[str, Rgb] = {
    "red": (222, 28, 32),
    "orange": (250, 140, 16),
    "yellow": (248, 226, 40),
    "green": (36, 158, 58),
    "cyan": (48, 214, 224),
    "blue": (36, 68, 222),
    "purple": (108, 40, 160),
    "magenta": (242, 16, 222),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
UNSAFE_COLOUR = "magenta"
BACKGROUND_TONES: dict[str, Rgb] = {
    **{name: rgb for name, rgb in COLOURS.items() if name != UNSAFE_COLOUR},
    "gray": (128, 128, 128),
    "brown": (116, 76, 44),
    "beige": (222, 206, 168),
    "navy": (22, 30, 84),
}
MIN_HALF_EXTENT_PX = 56
_MIN_CONTRAST = 100.0  # RGB distance between an object and each tone behind it


@dataclass(frozen=True)
class Outline:
    """A regular polygon or star: `corners` outer vertices, inner ones at `inner_ratio`.

    `phase` is the direction of the first outer vertex in radians (y grows downwards) and
    `reach` the outer radius in units of the object's radius. No corners means a circle.
    """

    corners: int
    inner_ratio: float
    phase: float
    reach: float


SHAPES: dict[str, Outline] = {
    "circle": Outline(0, 1.0, 0.0, 1.0),
    "square": Outline(4, math.cos(math.pi / 4), math.pi / 4, 1.06),
    "triangle": Outline(3, math.cos(math.pi / 3), -math.pi / 2, 1.08),
    "star": Outline(5, 0.45, -math.pi / 2, 1.08),
}


@dataclass(frozen=True)
class Thing:
    """What a prompt asks for: a shape of `SHAPES` in a colour of `COLOURS`."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Anchor:
    """Where an object stands: the mask's centroid and the distance from it to the edge, px."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background, a mask on it, and where an object under that mask goes.

    `tones` are the RGB colours of the background, `tone_name` the name of the first one.
    """

    background: Picture
    mask: Mask
    anchor: Anchor
    tones: tuple[Rgb, ...]
    tone_name: str

    def paint(self, thing: Thing, rng: np.random.Generator) -> Picture:
        """The background with `thing` under the mask, `(h, w, 3)` RGB, 0..255."""
        canvas = self.background.astype(np.float32)
        radius = self.anchor.radius * rng.uniform(0.88, 0.94)
        angle = rng.uniform(-0.08, 0.08)
        place = Anchor(self.anchor.x, self.anchor.y, radius)
        _blend(canvas, coverage(thing.shape, self.mask.shape, place, angle), thing.colour, rng)
        return _to_picture(canvas)

    def erase(self) -> Picture:
        """The background with the mask turned mid-grey, as the inpainting pipeline feeds it."""
        picture = self.background.copy()
        picture[self.mask] = 128
        return picture

    def allowed_colours(self) -> list[str]:
        """Colour names that stand out against every tone of the background."""
        return [name for name, rgb in COLOURS.items() if _stands_out(rgb, self.tones)]


def coverage(shape: str, size: tuple[int, ...], place: Anchor, angle: float) -> Plane:
    """How much of each pixel a shape covers, `size` = (h, w), 0..1, antialiased over one pixel."""
    outline = SHAPES[shape]
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    x += 0.5 - place.x
    y += 0.5 - place.y
    distance = np.hypot(x, y)
    outer = place.radius * outline.reach
    if outline.corners == 0:
        return _unit(0.5 - (distance - outer))
    sector = 2 * math.pi / outline.corners
    turned = np.arctan2(y, x) - outline.phase - angle
    folded = np.abs((turned + sector / 2) % sector - sector / 2)
    inner = outer * outline.inner_ratio
    edge_x = inner * math.cos(sector / 2) - outer
    edge_y = inner * math.sin(sector / 2)
    length = math.hypot(edge_x, edge_y)
    along_x = distance * np.cos(folded) - outer
    along_y = distance * np.sin(folded)
    signed = (along_x * edge_y - along_y * edge_x) / length
    return _unit(0.5 - signed)


def locate(mask: Mask) -> Anchor:
    """Centroid of a non-empty mask and its distance to the nearest kept pixel or border, px."""
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    y, x = float(ys.mean()) + 0.5, float(xs.mean()) + 0.5
    radius = min(x, y, width - x, height - y)
    kept_ys, kept_xs = np.nonzero(~mask)
    if kept_ys.size:
        nearest = np.min((kept_xs + 0.5 - x) ** 2 + (kept_ys + 0.5 - y) ** 2)
        radius = min(radius, math.sqrt(float(nearest)))
    return Anchor(x, y, radius)


def make_scene(rng: np.random.Generator, side: int) -> Scene:
    """A random square scene of `side` pixels, 256 or more."""
    names = rng.choice(list(BACKGROUND_TONES), size=2, replace=False)
    tones = tuple(_jitter(BACKGROUND_TONES[str(name)], 14, rng) for name in names)
    canvas, used = _background(rng, side, tones)
    mask = make_mask(rng, side)
    anchor = locate(mask)
    for _ in range(int(rng.choice([0, 1, 2], p=[0.66, 0.22, 0.12]))):
        _add_distractor(canvas, mask, rng)
    if rng.random() < 0.2:
        canvas += rng.normal(0.0, rng.uniform(1.0, 3.0), (side, side, 1)).astype(np.float32)
    return Scene(_to_picture(canvas), mask, anchor, used, str(names[0]))


def make_mask(rng: np.random.Generator, side: int) -> Mask:
    """A rectangle, ellipse, smooth blob or the whole picture, `(side, side)`, true = repaint."""
    kind = rng.choice(["rectangle", "ellipse", "blob", "full"], p=[0.4, 0.3, 0.25, 0.05])
    if kind == "full":
        return np.ones((side, side), np.bool_)
    largest = 0.42 * side
    half = math.exp(rng.uniform(math.log(MIN_HALF_EXTENT_PX), math.log(largest)))
    aspect = math.exp(rng.uniform(-0.22, 0.22))
    half_w = float(np.clip(half * math.sqrt(aspect), MIN_HALF_EXTENT_PX, largest))
    half_h = float(np.clip(half / math.sqrt(aspect), MIN_HALF_EXTENT_PX, largest))
    x = rng.uniform(half_w, side - half_w)
    y = rng.uniform(half_h, side - half_h)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    u = (columns + 0.5 - x) / half_w
    v = (rows + 0.5 - y) / half_h
    if kind == "rectangle":
        return np.asarray(np.maximum(np.abs(u), np.abs(v)) <= 1.0)
    if kind == "ellipse":
        return np.asarray(u * u + v * v <= 1.0)
    theta = np.arctan2(v, u)
    reach = np.full_like(theta, 0.9)
    for frequency in (2, 3, 4, 5):
        phase = rng.uniform(0, 2 * math.pi)
        reach += rng.uniform(-0.07, 0.07) * np.cos(frequency * theta + phase)
    return np.asarray(np.hypot(u, v) <= reach)


def _background(
    rng: np.random.Generator, side: int, tones: tuple[Rgb, ...]
) -> tuple[Plane, tuple[Rgb, ...]]:
    """A float picture `(side, side, 3)` and the tones that are visible in it."""
    kind = str(rng.choice(["solid", "gradient", "smooth", "pattern"], p=[0.2, 0.34, 0.22, 0.24]))
    if kind == "solid":
        share, tones = np.zeros((side, side), np.float32), tones[:1]
    else:
        share = _PLANES[kind](rng, side)
    if kind != "pattern" and rng.random() < 0.6:
        share = share * np.float32(rng.uniform(0.3, 0.6))
        middle = np.mean(np.array(tones, np.float32), axis=0)
        tones = (tones[0], (int(middle[0]), int(middle[1]), int(middle[2])), *tones[2:])
    first = np.array(tones[0], np.float32)
    last = np.array(tones[-1], np.float32)
    return first + share[..., None] * (last - first), tones


def _gradient(rng: np.random.Generator, side: int) -> Plane:
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    along = columns * math.cos(angle) + rows * math.sin(angle)
    return _unit(along / 1.2 + 0.5)


def _smooth(rng: np.random.Generator, side: int) -> Plane:
    total = np.zeros((side, side), np.float32)
    weight = 1.0
    for cells in (3, 6, 14):
        coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        total += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        weight *= 0.45
    return _unit((total - total.min()) / (np.ptp(total) + 1e-6))


def _pattern(rng: np.random.Generator, side: int) -> Plane:
    """Stripes, checks or dots at a period of 24..64 px, soft over two pixels."""
    period = rng.uniform(24, 64)
    angle = rng.uniform(0, math.pi)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    u = (columns * math.cos(angle) + rows * math.sin(angle)) * (2 * math.pi / period)
    v = (rows * math.cos(angle) - columns * math.sin(angle)) * (2 * math.pi / period)
    wave = {
        "stripes": np.sin(u),
        "checks": np.sin(u) * np.sin(v),
        "dots": np.cos(u) + np.cos(v) - 1.0,
    }[str(rng.choice(["stripes", "checks", "dots"]))]
    strength = rng.uniform(0.3, 1.0)
    return _unit(np.float32(strength) * _unit(0.5 + wave * period / 12.0))


_PLANES: dict[str, Callable[[np.random.Generator, int], Plane]] = {
    "gradient": _gradient,
    "smooth": _smooth,
    "pattern": _pattern,
}


def _add_distractor(canvas: Plane, mask: Mask, rng: np.random.Generator) -> None:
    """Draws a small shape on the kept part of the picture, if one of ten places is free."""
    side = canvas.shape[0]
    for _ in range(10):
        radius = rng.uniform(0.04, 0.09) * side
        x, y = rng.uniform(radius, side - radius, 2)
        window = mask[
            max(0, int(y - 1.2 * radius)) : int(y + 1.2 * radius) + 1,
            max(0, int(x - 1.2 * radius)) : int(x + 1.2 * radius) + 1,
        ]
        if not window.any():
            shape = str(rng.choice(list(SHAPES)))
            colour = str(rng.choice([name for name in COLOURS if name != UNSAFE_COLOUR]))
            place = Anchor(float(x), float(y), radius)
            alpha = coverage(shape, mask.shape, place, rng.uniform(-0.4, 0.4))
            _blend(canvas, alpha, colour, rng)
            return


def _blend(canvas: Plane, alpha: Plane, colour: str, rng: np.random.Generator) -> None:
    """Paints a colour with a slight shade from top to bottom, in place."""
    rgb = np.array(_jitter(COLOURS[colour], 6, rng), np.float32)
    shade = np.linspace(-1.0, 1.0, alpha.shape[0], dtype=np.float32) * rng.uniform(-8.0, 8.0)
    canvas += alpha[..., None] * (rgb + shade[:, None, None] - canvas)


def _jitter(rgb: Rgb, amount: int, rng: np.random.Generator) -> Rgb:
    red, green, blue = np.clip(np.array(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(red), int(green), int(blue)


def _stands_out(rgb: Rgb, tones: tuple[Rgb, ...]) -> bool:
    return all(math.dist(rgb, tone) >= _MIN_CONTRAST for tone in tones)


def _unit(values: NDArray[Any]) -> Plane:
    return np.asarray(np.clip(values, 0.0, 1.0), np.float32)


def _to_picture(canvas: Plane) -> Picture:
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
