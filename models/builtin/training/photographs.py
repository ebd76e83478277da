"""Photographs of Debian packages, named in `photographs.json`, and random crops of them.

No picture is part of this repository. `apt-get download PACKAGE` and `dpkg -x FILE ROOT/PACKAGE`
bring them to a folder ROOT without installing anything. Those marked `held_out` are never trained
on: they are for measuring.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.builtin.training.masks import hand_mask
from models.builtin.training.scenes import (
    Anchor,
    Picture,
    Plane,
    Rgb,
    Scene,
    locate,
    make_mask,
)

MANIFEST = Path(__file__).with_name("photographs.json")
_LONGEST_PX = 1800  # photographs are kept in memory at this size
_SMALLEST_CROP_PX = 200
_TONES, _TONE_SHARE = 5, 0.12  # of the square around an object
_GREY_SHARE, _TINTED_SHARE, _TEXTURE_SHARE = 0.15, 0.3, 0.1


@dataclass(frozen=True)
class Photograph:
    """A file of a Debian package, by its path inside the package, with its author and licence."""

    package: str
    file: str
    author: str
    licence: str
    held_out: bool

    @property
    def name(self) -> str:
        """The file's name; wallpapers that are only named by their size go by their folder."""
        parts = Path(self.file).parts
        return parts[-4] if "contents" in parts else Path(self.file).stem


def read_manifest(path: Path = MANIFEST) -> list[Photograph]:
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["photographs"]
    return [Photograph(**row) for row in rows]


def open_photograph(photograph: Photograph, root: Path, longest: int = _LONGEST_PX) -> Image.Image:
    """The photograph in RGB, scaled down to `longest` px.

    Raises `FileNotFoundError` naming the package that must be unpacked below `root` first.
    """
    path = root / photograph.package / photograph.file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: unpack {photograph.package} to {root} first")
    with Image.open(path) as image:
        image.draft("RGB", (longest, longest))
        picture = image.convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return picture


class Album:
    """Photographs in memory, from which crops are drawn at many scales."""

    def __init__(self, pictures: list[Image.Image]) -> None:
        """Raises `ValueError` without pictures."""
        if not pictures:
            raise ValueError("an album needs at least one photograph")
        self.pictures = pictures

    @classmethod
    def for_training(cls, root: Path) -> "Album":
        return cls([open_photograph(each, root) for each in read_manifest() if not each.held_out])

    @classmethod
    def of_held_out(cls, root: Path) -> "Album":
        return cls([open_photograph(each, root) for each in read_manifest() if each.held_out])

    def crop(self, rng: np.random.Generator, side: int) -> Picture:
        """A random square at a random scale, `(side, side, 3)`; some are procedural textures.

        Half are mirrored, some are grey and some are tinted.
        """
        if rng.random() < _TEXTURE_SHARE:
            return texture(rng, side)
        picture = self.pictures[int(rng.integers(len(self.pictures)))]
        box = _random_box(picture.size, side, rng)
        crop = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS, box))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        chance = rng.random()
        if chance < _GREY_SHARE:
            return np.asarray(np.repeat(crop.mean(axis=-1, keepdims=True), 3, axis=-1), np.uint8)
        is_tinted = chance < _GREY_SHARE + _TINTED_SHARE
        return _tint(crop, rng) if is_tinted else np.ascontiguousarray(crop)


def _random_box(
    size: tuple[int, int], side: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A square in the picture, from as sharp as the picture is up to all of its height."""
    largest = min(size)
    smallest = min(largest, max(_SMALLEST_CROP_PX, side * 3 // 4))
    edge = int(math.exp(rng.uniform(math.log(smallest), math.log(largest))))
    left = int(rng.integers(0, size[0] - edge + 1))
    top = int(rng.integers(0, size[1] - edge + 1))
    return left, top, left + edge, top + edge


def _tint(crop: Picture, rng: np.random.Generator) -> Picture:
    """Another white balance, exposure and saturation."""
    values = crop.astype(np.float32)
    grey = values.mean(axis=-1, keepdims=True)
    values = grey + (values - grey) * rng.uniform(0.4, 1.4)
    values *= np.exp(rng.uniform(-0.2, 0.2, 3) + rng.uniform(-0.25, 0.15))
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def texture(rng: np.random.Generator, side: int) -> Picture:
    """Noise whose amplitude falls with frequency as in photographs, in one range of colours.

    Stretched along one axis at random, so that it can look like wood, water or cloth.
    """
    grey = rng.uniform(20, 235)
    first = grey + rng.uniform(-60, 60, 3)
    last = first + rng.uniform(-90, 90) + rng.uniform(-25, 25, 3)
    share = _natural_noise(rng, side)[..., None]
    return np.clip(np.rint(first + share * (last - first)), 0, 255).astype(np.uint8)


def _natural_noise(rng: np.random.Generator, side: int) -> Plane:
    """`(side, side)` in 0..1."""
    stretch = math.exp(rng.uniform(-1.5, 1.5))
    rows = np.fft.fftfreq(side)[:, None] * stretch
    columns = np.fft.rfftfreq(side)[None] / stretch
    radius = np.hypot(rows, columns) + 1.0 / side
    white: NDArray[np.complex128] = np.fft.rfft2(rng.standard_normal((side, side)))
    noise = np.fft.irfft2(white / radius ** rng.uniform(0.8, 1.8), s=(side, side))
    low, high = np.percentile(noise, [1, 99])
    return np.asarray(np.clip((noise - low) / (high - low + 1e-9), 0.0, 1.0), np.float32)


def photographic_scene(album: Album, rng: np.random.Generator, side: int) -> Scene:
    """A crop under a mask as people paint them, for continuing the photograph."""
    mask = hand_mask(rng, side)
    return Scene(album.crop(rng, side), mask, locate(mask), (), "photograph")


def staged_scene(album: Album, rng: np.random.Generator, side: int) -> Scene:
    """A crop under a mask with room for an object; its tones are the colours around the object."""
    picture, mask = album.crop(rng, side), make_mask(rng, side)
    anchor = locate(mask)
    return Scene(picture, mask, anchor, _tones_around(picture, anchor), "photograph")


def _tones_around(picture: Picture, anchor: Anchor) -> tuple[Rgb, ...]:
    """The commonest colours of the square that an object at `anchor` stands in."""
    reach = 1.2 * anchor.radius
    height, width = picture.shape[:2]
    left, top = max(0.0, anchor.x - reach), max(0.0, anchor.y - reach)
    box = (left, top, min(width, anchor.x + reach), min(height, anchor.y + reach))
    part = Image.fromarray(picture).crop(box).resize((24, 24)).quantize(_TONES)
    palette = part.getpalette() or []
    counts = np.bincount(np.asarray(part).ravel())
    common = np.flatnonzero(counts >= _TONE_SHARE * counts.sum())
    return tuple((palette[3 * i], palette[3 * i + 1], palette[3 * i + 2]) for i in common)
