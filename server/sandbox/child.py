"""The sandboxed child program: reads files of pictures, writes their pixels; `process` starts it.

The child has an empty environment, no settings and no secrets, so that an exploited decoder finds
nothing to steal. This module defines the format on both pipes. `main` returns at the end of input.
"""

import contextlib
import ctypes
import functools
import os
import struct
import sys
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

# Pillow imports these when it needs them, but a confined process can open no file.
from PIL import ImageChops, ImagePalette, ImageSequence, MpoImagePlugin, TiffImagePlugin

from models.errors import ImageFault, UnreadableImage
from models.imaging.decoding import (
    DecodedImage,
    DecodedMask,
    ImageLimits,
    PixelMode,
    Stored,
    decode_image,
    decode_mask,
)
from models.imaging.extension import NO_EXTENSION, Extension, Placement
from models.imaging.mask_reading import MaskReading, MaskRule
from models.params import fit_size
from server.sandbox.seccomp import confine

PRELOADED = (
    ImageChops,
    ImagePalette,
    ImageSequence,
    MpoImagePlugin,
    TiffImagePlugin,
)

MEMORY_BYTES = 540 * 2**20
"""Memory limit beyond what the child has mapped. A WebP of 33 megapixels takes 16 bytes a pixel."""

CPU_S = 3_600
"""CPU limit of the process in all. It ends code that keeps computing between pictures; the parent
limits the time of each picture."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""

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


def write_reply(picture: DecodedImage | DecodedMask | ImageFault) -> list[bytes | memoryview]:
    """A reply, in parts, so that the pixels are not copied."""
    if isinstance(picture, ImageFault):
        return [REPLY.pack(1 + FAULTS.index(picture), 0, 0, *NOT_STORED, 0, 0, 0)]
    profile = b""
    if isinstance(picture, DecodedImage):
        profile = picture.icc_profile
        note = PROFILE_LOST * picture.is_profile_lost | ALPHA_LOST * picture.is_alpha_lost
    else:
        note = READINGS.index(picture.read_as)
    height, width = picture.pixels.shape[:2]
    mode = MODES.index(picture.mode)
    head = REPLY.pack(PICTURE, width, height, *picture.stored, mode, note, len(profile))
    return [head, np.ascontiguousarray(picture.pixels).data, profile]


def main(max_bytes: int, max_pixels: int, max_side: int) -> None:
    """Answer requests until standard input ends."""
    limits = ImageLimits(max_bytes, max_pixels, max_side)
    tune_malloc()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    # Warnings of libraries can quote the file, and would appear in the server's log.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    is_filtered = confine(MEMORY_BYTES, CPU_S)
    replies.write(READY if is_filtered else READY_UNFILTERED)
    replies.flush()
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        kind, size, width, height, keeps_own_size, *others = REQUEST.unpack(head)
        sides, (rule, *stored) = others[:4], others[4:]
        target = TargetSize(width or None, height or None, keeps_own_size, Extension(*sides))
        context = MaskContext(RULES[rule], Stored(*stored))
        picture = decode(Kind(kind), requests.read(size), limits, target, context)
        replies.writelines(write_reply(picture))
        del picture
        replies.flush()


def limits_of(kind: Kind, limits: ImageLimits, target: TargetSize) -> ImageLimits:
    """The limits of one picture."""
    if kind is Kind.INIT_IMAGE and target.keeps_own_size:
        return replace(limits, max_pixels=min(limits.max_pixels, CROP_MAX_PIXELS))
    return limits


def fit_within(
    target: TargetSize, limits: ImageLimits, own_width: int, own_height: int
) -> tuple[int, int]:
    """As `TargetSize.fit`. Raises: UnreadableImage where the extended picture is too large."""
    if not target.is_within(limits, own_width, own_height):
        raise UnreadableImage("init_image", ImageFault.TOO_LARGE, "is too large once extended")
    return target.fit(own_width, own_height)


def tune_malloc() -> None:
    """Make glibc keep the memory of a usual picture, and return that of a large one at once.

    Without this the kernel clears the same few megabytes for every picture, which takes 2 ms.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        with contextlib.suppress(AttributeError):  # another C library
            libc.mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
            libc.mallopt(M_TRIM_THRESHOLD, 32 * 2**20)


def decode(
    kind: Kind,
    content: bytes,
    limits: ImageLimits,
    target: TargetSize,
    context: MaskContext = USUAL_MASK,
) -> DecodedImage | DecodedMask | ImageFault:
    """The picture or its fault."""
    limits = limits_of(kind, limits, target)
    try:
        if kind is Kind.INIT_IMAGE:
            return decode_image(content, limits, functools.partial(fit_within, target, limits))
        return decode_mask(
            content, limits, target.fit, init_image=context.init_image, rule=context.rule
        )
    except UnreadableImage as error:
        return error.kind
