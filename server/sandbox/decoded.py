"""`DecodedPair`: an init image and its mask as arrays, and as the bytes that a worker reads."""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.imaging.decoding import PixelMode, Stored
from models.imaging.mask_reading import MaskReading
from server.core.notices import Notice

FORMAT_MAGIC = b"\x89IPI"
"""First bytes of a stored pair. Format 1 began with the height, which is never as large as this."""

FORMAT_VERSION = 2
"""Version that `DecodedPair.to_bytes` writes. 1 had no magic, no version and no colour profile."""

FORMAT_HEAD = struct.Struct("<4sB")

STORED_SIZE = struct.Struct("<II")

PROFILE_SIZE = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Sources:
    """How the files of a pair held their pictures; for a picture without a file, how it was made.

    An orientation of the mask may be the init image's, which was then applied to it.
    """

    init_image: Stored
    init_mode: PixelMode
    mask: Stored
    mask_mode: PixelMode


UNKNOWN = Sources(Stored(0, 0, 1), PixelMode.RGB, Stored(0, 0, 1), PixelMode.GREY)
"""What a pair has that `from_bytes` has read."""


@dataclass(frozen=True, slots=True)
class DecodedPair:
    """init_image: `(h, w, 3)` uint8 RGB; mask: `(h, w)` uint8.

    icc_profile: the init image's; empty for sRGB.
    read_as, notices: how the files were interpreted. Part of the job's row, not of `to_bytes`.
    sources: what the files were, for checks. Not part of `to_bytes`.
    """

    init_image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    icc_profile: bytes = b""
    read_as: MaskReading = MaskReading.WHITE
    notices: tuple[Notice, ...] = ()
    sources: Sources = UNKNOWN

    def to_bytes(self) -> bytes:
        """Magic, version, height, width, size of the profile, profile, pixels of both pictures."""
        planes = [np.ascontiguousarray(each).data for each in (self.init_image, self.mask)]
        head = FORMAT_HEAD.pack(FORMAT_MAGIC, FORMAT_VERSION) + STORED_SIZE.pack(*self.mask.shape)
        profile = PROFILE_SIZE.pack(len(self.icc_profile)) + self.icc_profile
        return b"".join([head, profile, *planes])

    @classmethod
    def from_bytes(cls, content: bytes) -> "DecodedPair":
        """A pair that `to_bytes` wrote in this version or the one before it.

        Raises: UnknownFormat for a later version; ValueError for anything else.
        """
        profile, at = b"", 0
        if is_versioned := content.startswith(FORMAT_MAGIC):
            version = content[len(FORMAT_MAGIC) :][:1]
            if version and version[0] != FORMAT_VERSION:
                raise UnknownFormat(version[0])
            at = FORMAT_HEAD.size
        try:
            height, width = STORED_SIZE.unpack_from(content, at)
            at += STORED_SIZE.size
            if is_versioned:
                (size,) = PROFILE_SIZE.unpack_from(content, at)
                at += PROFILE_SIZE.size
                profile, at = content[at : at + size], at + size
        except struct.error as error:
            raise ValueError("no pair of pictures") from error
        # A copy, because PyTorch accepts only writable arrays.
        pixels = np.frombuffer(bytearray(memoryview(content)[at:]), np.uint8)
        init_image, mask = pixels[: height * width * 3], pixels[height * width * 3 :]
        return cls(init_image.reshape(height, width, 3), mask.reshape(height, width), profile)


class UnknownFormat(ValueError):
    """A later version of the server has stored this pair."""

    def __init__(self, version: int) -> None:
        super().__init__(f"stored images of format {version}, and this server knows 1 and 2")
