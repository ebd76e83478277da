"""The child process of `sandbox.py`: bytes of one picture in, its pixels out, and again.

It starts with an empty environment and knows no setting and no secret. The formats on its two pipes
stand here. Run as `main(…)`; ends when its standard input does.
"""

import contextlib
import ctypes
import os
import struct
import sys
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

# Named here so that they are loaded now: once confined, the process can open no file.
from PIL import ImageChops, ImagePalette, ImageSequence, MpoImagePlugin, TiffImagePlugin

from models.errors import ImageFault, UnreadableImage
from models.imaging.decoding import (
    DecodedImage,
    DecodedMask,
    ImageLimits,
    Stored,
    decode_image,
    decode_mask,
)
from models.imaging.mask_reading import MaskReading
from models.params import fit_size
from server.sandbox.seccomp import confine

LOADED_BEFORE_CONFINEMENT = (
    ImageChops,
    ImagePalette,
    ImageSequence,
    MpoImagePlugin,
    TiffImagePlugin,
)

MEMORY_BYTES = 540 * 2**20
"""For one picture. A WebP of 33 megapixels takes 16 bytes a pixel."""

CPU_S = 3_600
"""Of the process in all. A picture's own time is the parent's to watch: this ends what computes on
between pictures."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""

READY, READY_UNFILTERED = b"R", b"r"
REQUEST = struct.Struct("<BIHH?HHB")
"""Kind, bytes of the file, which follows, the width and height wanted, 0 for one left open, whether
the picture may keep its own size, and for a mask how the init image is stored, zeros where that is
not known."""
REPLY = struct.Struct("<BHHHHBBI")
"""Outcome, and for a picture: width, height, how it is stored, a note, and the bytes of its colour
profile. Its pixels follow, then the profile. The note is the index in `READINGS` for a mask, and
the sum of `PROFILE_LOST` and `ALPHA_LOST`, as far as they hold, for an init image."""
PICTURE = 0
PROFILE_LOST = 1
ALPHA_LOST = 2
READINGS = tuple(MaskReading)
NOT_STORED = Stored(0, 0, 0)
FAULTS = tuple(ImageFault)
"""Outcome 1 is the first of these."""

CROP_MAX_PIXELS = 2_048 * 2_048
"""Of an init image that keeps its own size, because the model works on a part of it only."""


class Kind(IntEnum):
    """What a file is read as."""

    INIT_IMAGE = 0
    MASK_IMAGE = 1

    @property
    def channels(self) -> int:
        """Bytes of a pixel."""
        return 3 if self is Kind.INIT_IMAGE else 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """The size a picture is decoded at: that of a job, or its own where a side is left open."""

    width: int | None = None
    height: int | None = None
    keeps_own_size: bool = False

    def fit(self, own_width: int, own_height: int) -> tuple[int, int]:
        """Width and height, for a picture of this size."""
        if self.keeps_own_size:
            return self.width or own_width, self.height or own_height
        return fit_size(own_width, own_height, self.width, self.height)


def write_request(
    kind: Kind, content: bytes, wanted: Wanted, *, init_image: Stored | None = None
) -> bytes:
    """A request, with its file. init_image: how the one that a mask belongs to is stored."""
    size = wanted.width or 0, wanted.height or 0
    stored = init_image or NOT_STORED
    return REQUEST.pack(kind, len(content), *size, wanted.keeps_own_size, *stored) + content


def write_reply(picture: DecodedImage | DecodedMask | ImageFault) -> list[bytes | memoryview]:
    """What the parent reads, in parts: the pixels are large."""
    if isinstance(picture, ImageFault):
        return [REPLY.pack(1 + FAULTS.index(picture), 0, 0, *NOT_STORED, 0, 0)]
    profile = b""
    if isinstance(picture, DecodedImage):
        profile = picture.icc_profile
        note = PROFILE_LOST * picture.is_profile_lost | ALPHA_LOST * picture.is_alpha_lost
    else:
        note = READINGS.index(picture.read_as)
    height, width = picture.pixels.shape[:2]
    head = REPLY.pack(PICTURE, width, height, *picture.stored, note, len(profile))
    return [head, np.ascontiguousarray(picture.pixels).data, profile]


def main(max_bytes: int, max_pixels: int, max_side: int) -> None:
    """Answer requests until there are no more."""
    limits = ImageLimits(max_bytes, max_pixels, max_side)
    keep_small_blocks()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    # Libraries write warnings of their own, with what the file says.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    is_filtered = confine(MEMORY_BYTES, CPU_S)
    replies.write(READY if is_filtered else READY_UNFILTERED)
    replies.flush()
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        kind, size, width, height, keeps_own_size, *stored = REQUEST.unpack(head)
        wanted = Wanted(width or None, height or None, keeps_own_size)
        picture = decode(Kind(kind), requests.read(size), limits, wanted, Stored(*stored))
        replies.writelines(write_reply(picture))
        del picture
        replies.flush()


def limits_of(kind: Kind, limits: ImageLimits, wanted: Wanted) -> ImageLimits:
    """The limits of one picture. What comes of it is no larger than it may be itself."""
    if kind is Kind.INIT_IMAGE and wanted.keeps_own_size:
        return replace(limits, max_pixels=min(limits.max_pixels, CROP_MAX_PIXELS))
    return limits


def keep_small_blocks() -> None:
    """Let glibc keep what a usual picture takes, and give back at once what a large one took.

    Otherwise the kernel clears the same few megabytes for every picture, which costs 2 ms of it.
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
    wanted: Wanted,
    init_image: Stored = NOT_STORED,
) -> DecodedImage | DecodedMask | ImageFault:
    """The picture, or why there is none. init_image: how the one a mask belongs to is stored."""
    limits = limits_of(kind, limits, wanted)
    try:
        if kind is Kind.INIT_IMAGE:
            return decode_image(content, limits, wanted.fit)
        return decode_mask(content, limits, wanted.fit, init_image=init_image)
    except UnreadableImage as error:
        return error.kind
