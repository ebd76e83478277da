"""The sandboxed child program: reads files of pictures, writes their pixels; `process` starts it.

The child has an empty environment, no settings and no secrets, so that an exploited decoder finds
nothing to steal. `wire` has the format on both pipes. `main` returns at the end of input.
"""

import contextlib
import ctypes
import functools
import os
import sys

import numpy as np

# Pillow imports these when it needs them, but a confined process can open no file.
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
from models.imaging.extension import Extension
from server.sandbox.seccomp import confine
from server.sandbox.wire import (
    ALPHA_LOST,
    FAULTS,
    MODES,
    NOT_STORED,
    PICTURE,
    PROFILE_LOST,
    READINGS,
    READY,
    READY_UNFILTERED,
    REPLY,
    REQUEST,
    RULES,
    USUAL_MASK,
    Kind,
    MaskContext,
    TargetSize,
    limits_of,
)

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
