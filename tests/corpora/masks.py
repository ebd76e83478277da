"""Masks as people draw them, and their inversions, to measure what a check makes of them.

Each is made of a seed, so that the corpus has as many as a test wants. Masks are mode L, or RGBA
where the drawing lies on a transparent canvas.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from tests.support.image_files import saved

Random = np.random.Generator
Size = tuple[int, int]


@functools.cache
def photograph(size: Size, seed: int) -> Image.Image:
    """Soft shapes with grain, as a camera gives them."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
    shapes = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    grain = random.normal(0, 6, (size[1], size[0], 1))
    return Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8))


def blank(size: Size) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    mask = Image.new("L", size)
    return mask, ImageDraw.Draw(mask)


def blob(size: Size, random: Random) -> Image.Image:
    """One object somewhere inside, of 1 to 30 % of the picture."""
    mask, draw = blank(size)
    width, height = size
    x, y = random.uniform(0.4, 0.6, 2) * size
    radius = random.uniform(0.05, 0.25)
    for _ in range(6):
        across, down = radius * random.uniform(0.6, 1.2, 2) * size
        at_x, at_y = x + random.normal(0, 0.05) * width, y + random.normal(0, 0.05) * height
        draw.ellipse((at_x - across, at_y - down, at_x + across, at_y + down), fill=255)
    return mask


def rectangle(size: Size, random: Random) -> Image.Image:
    mask, draw = blank(size)
    left, top = random.uniform(0.1, 0.4, 2) * size
    across, down = random.uniform(0.15, 0.4, 2) * size
    draw.rectangle((left, top, left + across, top + down), fill=255)
    return mask


def lasso(size: Size, random: Random) -> Image.Image:
    mask, draw = blank(size)
    angles = np.sort(random.uniform(0, 2 * np.pi, 12))
    radii = random.uniform(0.1, 0.3, 12)
    points = [
        ((0.5 + radius * np.cos(angle)) * size[0], (0.5 + radius * np.sin(angle)) * size[1])
        for angle, radius in zip(angles, radii, strict=True)
    ]
    draw.polygon(points, fill=255)
    return mask


def two_objects(size: Size, random: Random) -> Image.Image:
    mask, draw = blank(size)
    for x in (0.3, 0.7):
        across, down = random.uniform(0.05, 0.12, 2) * size
        at_x, at_y = x * size[0], random.uniform(0.3, 0.7) * size[1]
        draw.ellipse((at_x - across, at_y - down, at_x + across, at_y + down), fill=255)
    return mask


def thin_strokes(size: Size, random: Random) -> Image.Image:
    """Scratches and wires of a pixel or two."""
    mask, draw = blank(size)
    for _ in range(6):
        points = [tuple(random.uniform(0.05, 0.95, 2) * size) for _ in range(4)]
        draw.line(points, fill=255, width=int(random.integers(1, 3)))
    return mask


def wires_across(size: Size, random: Random) -> Image.Image:
    """Lines from border to border."""
    mask, draw = blank(size)
    for _ in range(3):
        left, right = random.uniform(0.1, 0.9, 2) * size[1]
        draw.line((0, left, size[0], right), fill=255, width=3)
    return mask


def many_dots(size: Size, random: Random) -> Image.Image:
    """Dust."""
    mask, draw = blank(size)
    for x, y in random.uniform(0.03, 0.97, (150, 2)) * size:
        radius = random.uniform(4, 9)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def watermark(size: Size, random: Random) -> Image.Image:
    """Letters in a corner."""
    mask, draw = blank(size)
    left, top = 0.6 * size[0], 0.88 * size[1]
    for index in range(8):
        x = left + index * 0.045 * size[0]
        draw.rectangle((x, top, x + 0.02 * size[0], top + 0.07 * size[1]), fill=255)
    return mask


def sky(size: Size, random: Random) -> Image.Image:
    """The upper 70 %, down to hills."""
    mask, draw = blank(size)
    hills = 0.7 + 0.04 * np.sin(np.linspace(0, 9, 30) + random.uniform(0, 6))
    ground = [(x / 29 * size[0], y * size[1]) for x, y in enumerate(hills)]
    draw.polygon([(0, 0), *ground, (size[0], 0)], fill=255)
    return mask


def right_border(size: Size, random: Random) -> Image.Image:
    """New pixels on one side."""
    mask, draw = blank(size)
    draw.rectangle((random.uniform(0.6, 0.8) * size[0], 0, *size), fill=255)
    return mask


def two_borders(size: Size, random: Random) -> Image.Image:
    """A large corner."""
    mask, draw = blank(size)
    left, top = random.uniform(0.15, 0.4, 2) * size
    draw.rectangle((left, top, *size), fill=255)
    return mask


def lower_half(size: Size, random: Random) -> Image.Image:
    mask, draw = blank(size)
    draw.rectangle((0, random.uniform(0.3, 0.7) * size[1], *size), fill=255)
    return mask


def person(size: Size, random: Random) -> Image.Image:
    """Head and shoulders, cut off by the lower border."""
    mask, draw = blank(size)
    middle, width = random.uniform(0.4, 0.6) * size[0], 0.2 * size[0]
    draw.ellipse((middle - width / 2, 0.2 * size[1], middle + width / 2, 0.55 * size[1]), fill=255)
    draw.ellipse((middle - width, 0.5 * size[1], middle + width, 1.4 * size[1]), fill=255)
    return mask


def wall(size: Size, random: Random) -> Image.Image:
    """All but a person."""
    return ImageOps.invert(person(size, random))


def soft_brush(size: Size, random: Random) -> Image.Image:
    return blob(size, random).filter(ImageFilter.GaussianBlur(size[0] / 60))


def on_transparency(size: Size, random: Random) -> Image.Image:
    """Red strokes on a transparent canvas."""
    drawing = Image.new("RGBA", size)
    drawing.paste("red", mask=blob(size, random))
    return drawing


Draw = Callable[[Size, Random], Image.Image]

OBJECTS: tuple[Draw, ...] = (
    *(blob, rectangle, lasso, two_objects, thin_strokes, many_dots, watermark, soft_brush),
)
"""Masks of which nobody means the inversion."""

OTHERS: tuple[Draw, ...] = (
    *(wires_across, sky, right_border, two_borders, lower_half, person, wall, on_transparency),
)
"""Masks of which the inversion may be meant too, or is read as what was meant."""


@dataclass(frozen=True)
class Sample:
    """name: of its kind. mask: the file. picture: which it belongs to."""

    name: str
    mask: bytes
    picture: Image.Image


def file_of(mask: Image.Image, random: Random) -> bytes:
    """A PNG, or where alpha is not needed also a JPEG of good quality."""
    if mask.mode == "L" and random.integers(3) == 0:
        return saved(mask, "JPEG", quality=int(random.integers(85, 98)))
    return saved(mask)


def drawn(draw: Draw, size: Size, seed: int, *, is_inverted: bool = False) -> Sample:
    """A mask of a kind and its picture."""
    random = np.random.default_rng(seed)
    mask = draw(size, random)
    if is_inverted:
        mask = ImageOps.invert(mask)
    return Sample(draw.__name__, file_of(mask, random), photograph(size, seed))


def extended(size: Size, seed: int) -> Sample:
    """A picture with new pixels on all sides, which repeat its edge; it keeps 11 to 64 %."""
    random = np.random.default_rng(seed)
    kept = random.uniform(0.33, 0.8)
    own = round(kept * size[0]), round(kept * size[1])
    left, top = (size[0] - own[0]) // 2, (size[1] - own[1]) // 2
    margins = ((top, size[1] - own[1] - top), (left, size[0] - own[0] - left))
    pixels = np.pad(np.asarray(photograph(own, seed)), (*margins, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(own[::-1], np.uint8), margins, constant_values=255)
    return Sample("extended", saved(Image.fromarray(mask)), Image.fromarray(pixels))
