"""Masks as people paint them over a photograph: strokes, blobs, polygons and borders."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.builtin.training.scenes import Mask

_KINDS = ("stroke", "blob", "polygon", "object", "border")
_SHARES = (0.28, 0.26, 0.14, 0.2, 0.12)
_MIN_AREA, _MAX_AREA = 0.01, 0.5  # of the picture
_LATENT_PX = 8  # a mask that covers no middle of a latent would teach nothing


def hand_mask(rng: np.random.Generator, side: int) -> Mask:
    """A random mask `(side, side)`, true = repaint, of 1 to 50 % of the picture."""
    while True:
        canvas = Image.new("1", (side, side))
        _DRAWERS[str(rng.choice(_KINDS, p=_SHARES))](ImageDraw.Draw(canvas), rng, side)
        mask = np.asarray(canvas)
        sampled = mask[::_LATENT_PX, ::_LATENT_PX]
        if sampled.any() and _MIN_AREA <= mask.mean() <= _MAX_AREA:
            return mask.copy()


def _stroke(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """One or two lines of a round brush, each with a few bends."""
    for _ in range(int(rng.integers(1, 3))):
        width = rng.uniform(0.03, 0.14) * side
        place = rng.uniform(0.1, 0.9, 2) * side
        heading = rng.uniform(0, 2 * math.pi)
        for _ in range(int(rng.integers(1, 6))):
            heading += rng.normal(0, 0.7)
            step = rng.uniform(0.08, 0.28) * side * np.array([math.cos(heading), math.sin(heading)])
            _line(draw, place, place + step, width)
            place = place + step


def _line(
    draw: ImageDraw.ImageDraw, start: NDArray[np.float64], end: NDArray[np.float64], width: float
) -> None:
    draw.line([*start, *end], fill=1, width=max(1, round(width)))
    for x, y in (start, end):
        reach = 0.5 * width
        draw.ellipse([x - reach, y - reach, x + reach, y + reach], fill=1)


def _blob(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A smooth closed outline around a random place."""
    centre = rng.uniform(0.1, 0.9, 2) * side
    reach = rng.uniform(0.06, 0.3, 2) * side
    angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    radius = np.ones_like(angles)
    for frequency in (2, 3, 4, 5):
        radius += rng.uniform(-0.12, 0.12) * np.cos(frequency * angles + rng.uniform(0, 6.3))
    xs = centre[0] + reach[0] * radius * np.cos(angles)
    ys = centre[1] + reach[1] * radius * np.sin(angles)
    draw.polygon(list(zip(xs, ys, strict=True)), fill=1)


def _polygon(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """Three to seven straight edges, or a rectangle."""
    centre, reach = rng.uniform(0.15, 0.85, 2) * side, rng.uniform(0.08, 0.3, 2) * side
    if rng.random() < 0.4:
        draw.rectangle([*(centre - reach), *(centre + reach)], fill=1)
        return
    angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 8))))
    points = centre + reach * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    draw.polygon([(float(x), float(y)) for x, y in points], fill=1)


def _object(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A body with limbs, as somebody covers a person, an animal or a tree."""
    centre = rng.uniform(0.2, 0.8, 2) * side
    body = rng.uniform(0.05, 0.16, 2) * side
    draw.ellipse([*(centre - body), *(centre + body)], fill=1)
    for _ in range(int(rng.integers(1, 6))):
        angle = rng.uniform(0, 2 * math.pi)
        tip = centre + rng.uniform(0.12, 0.34) * side * np.array([math.cos(angle), math.sin(angle)])
        _line(draw, centre, tip, rng.uniform(0.03, 0.09) * side)


def _border(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """One or two sides of the picture, as when it is extended."""
    depth = rng.uniform(0.08, 0.3) * side
    strips = [
        (0, 0, depth, side),
        (side - depth, 0, side, side),
        (0, 0, side, depth),
        (0, side - depth, side, side),
    ]
    for index in rng.choice(4, size=int(rng.integers(1, 3)), replace=False):
        draw.rectangle(strips[int(index)], fill=1)


_DRAWERS = {
    "stroke": _stroke,
    "blob": _blob,
    "polygon": _polygon,
    "object": _object,
    "border": _border,
}
