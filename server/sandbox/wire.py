"""The format on both pipes of a sandboxed child, and the terms in which pictures are asked for.

The parent and the child both load this module, so it imports nothing that the child has no use for.
"""

import struct
from dataclasses import dataclass, replace
from enum import IntEnum

from models.errors import ImageFault
from models.imaging.decoding import ImageLimits, PixelMode, Stored
from models.imaging.extension import NO_EXTENSION, Extension, Placement
from models.imaging.mask_reading import MaskReading, MaskRule
from models.params import fit_size

READY, READY_UNFILTERED = b"R", b"r"
REQUEST = struct.Struct("<BIHH?HHHHBHHB")
"""Kind; size of the file, which follows; target width and height, 0 for one that is not given;
whether the picture may keep its own size; the pixels by which it is extended on the left, at the
top, on the right and at the bottom; the rule for a mask, an index in `RULES`; for a mask how the
init image is stored, else zeros."""
REPLY = struct.Struct("<BHHHHBBBI")
"""Outcome, and for a picture: width, height, how it is stored, the kind of its pixels, an index in
`MODES`, a note, and the bytes of its colour profile. The pixels follow, then the profile. A mask's
note is an index in `READINGS`. An init image's note is a sum of the flags `PROFILE_LOST` and
`ALPHA_LOST`."""
PICTURE = 0
PROFILE_LOST = 1
ALPHA_LOST = 2
READINGS = tuple(MaskReading)
MODES = tuple(PixelMode)
RULES = tuple(MaskRule)
NOT_STORED = Stored(0, 0, 0)
FAULTS = tuple(ImageFault)
"""The outcome of a failure is 1 + its index."""

CROP_MAX_PIXELS = 2_048 * 2_048
"""Limit of an init image that keeps its own size, because the model sees only a crop of it."""


class Kind(IntEnum):
    """The role of a file, which decides how it is decoded."""

    INIT_IMAGE = 0
    MASK_IMAGE = 1

    @property
    def channels(self) -> int:
        """Bytes per pixel."""
        return 3 if self is Kind.INIT_IMAGE else 1


@dataclass(frozen=True, slots=True)
class TargetSize:
    """The size of a picture once it is extended; None for a side that follows from the picture.

    keeps_own_size: a side that is not given is as long as the extended picture's, and one that is
        given need not be a multiple of 8.
    """

    width: int | None = None
    height: int | None = None
    keeps_own_size: bool = False
    extension: Extension = NO_EXTENSION

    def fit(self, own_width: int, own_height: int) -> tuple[int, int]:
        """Width and height at which a picture of this size is decoded."""
        place = self.place(own_width, own_height)
        return place.width, place.height

    def place(self, own_width: int, own_height: int) -> Placement:
        """Where a picture of this size lies in the extended one."""
        width, height = self.extension.extended(own_width, own_height)
        if self.keeps_own_size:
            canvas = self.width or width, self.height or height
        else:
            canvas = fit_size(width, height, self.width, self.height)
        return self.extension.place((own_width, own_height), canvas)

    def is_within(self, limits: ImageLimits, own_width: int, own_height: int) -> bool:
        """Whether a picture of this size is within the limits when it is extended."""
        width, height = self.extension.extended(own_width, own_height)
        return max(width, height) <= limits.max_side and width * height <= limits.max_pixels


@dataclass(frozen=True, slots=True)
class MaskContext:
    """What decoding a mask needs to know besides its size.

    rule: how the file is read. init_image: how the init image is stored.
    """

    rule: MaskRule = MaskRule.EVIDENT
    init_image: Stored = NOT_STORED


USUAL_MASK = MaskContext()


def write_request(
    kind: Kind, content: bytes, target: TargetSize, context: MaskContext = USUAL_MASK
) -> bytes:
    """A request, with its file. context: of a mask."""
    size = target.width or 0, target.height or 0
    extension = target.extension
    sides = extension.left, extension.top, extension.right, extension.bottom
    rule = RULES.index(context.rule)
    wanted = *size, target.keeps_own_size, *sides
    return REQUEST.pack(kind, len(content), *wanted, rule, *context.init_image) + content


def limits_of(kind: Kind, limits: ImageLimits, target: TargetSize) -> ImageLimits:
    """The limits of one picture."""
    if kind is Kind.INIT_IMAGE and target.keeps_own_size:
        return replace(limits, max_pixels=min(limits.max_pixels, CROP_MAX_PIXELS))
    return limits
