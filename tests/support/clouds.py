"""The example with clouds, small, and its mask in each form that clients write."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from server.cli.demo import EXAMPLES
from tests.support.programs import Pixels

SIDE = 256
PROMPT = "a red circle"
STEPS = 6


@dataclass(frozen=True)
class Clouds:
    """Files in a folder, 256 x 256 pixels each; the mask covers 22 percent."""

    folder: Path

    @property
    def picture(self) -> Path:
        return self.folder / "clouds.png"

    @property
    def mask(self) -> Path:
        """Mode L: white is painted."""
        return self.folder / "mask.png"

    @property
    def mask_jpeg(self) -> Path:
        """The same with JPEG's noise along the edges."""
        return self.folder / "mask.jpg"

    @property
    def mask_alpha(self) -> Path:
        """Mode RGBA: the picture itself, transparent where it is painted."""
        return self.folder / "mask-alpha.png"

    @property
    def mask_opaque(self) -> Path:
        """Mode RGBA: red brush strokes, opaque where it is painted, on nothing."""
        return self.folder / "mask-opaque.png"

    @property
    def broken(self) -> Path:
        """A PNG that ends too early."""
        return self.folder / "broken.png"

    def assert_edited(self, picture: Pixels) -> None:
        """Not one pixel outside the mask has changed, and nearly all inside it have."""
        before = np.asarray(Image.open(self.picture))
        painted = np.asarray(Image.open(self.mask)) > 127
        assert_changed_within(painted, before, picture)


def assert_changed_within(painted: NDArray[np.bool_], before: Pixels, after: Pixels) -> None:
    """painted: `(h, w)`, where the mask is white."""
    assert after.shape == before.shape
    changed = (after != before).any(axis=2)
    assert int((changed & ~painted).sum()) == 0
    assert float(changed[painted].mean()) > 0.9


def write_clouds(folder: Path) -> Clouds:
    """All files of the example."""
    clouds = Clouds(folder)
    picture = Image.open(EXAMPLES / "clouds.png").convert("RGB").resize((SIDE, SIDE))
    mask = Image.open(EXAMPLES / "clouds_mask.png").convert("L")
    mask = mask.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    picture.save(clouds.picture)
    mask.save(clouds.mask)
    mask.save(clouds.mask_jpeg, quality=90)
    erased = picture.copy()
    erased.putalpha(ImageChops.invert(mask))
    erased.save(clouds.mask_alpha)
    strokes = Image.new("RGBA", picture.size, (255, 0, 0, 255))
    strokes.putalpha(mask)
    strokes.save(clouds.mask_opaque)
    clouds.broken.write_bytes(clouds.picture.read_bytes()[:2000])
    return clouds
