"""What a picture's numbers mean: ICC profiles that are kept, or used to convert to sRGB.

An RGB profile stays with the picture, so that kept pixels are the client's own, bit for bit, and
look as they did. Inks and greys become RGB, and so are converted.
"""

import struct
import zlib
from collections.abc import Mapping
from io import BytesIO

from PIL import Image, ImageCms

MAX_KEPT_BYTES = 2**20
"""Limit of a profile that every result embeds. Camera and display profiles have 0.5 to 20 kB."""

MAX_USED_BYTES = 4 * 2**20
"""Limit of a profile that is only converted from. Printing presses' have 0.5 to 3 MB."""

# Made now: a confined process can open no file, not even the one of time zones.
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

_CMS_FAULTS = (ImageCms.PyCMSError, OSError, RuntimeError, TypeError, ValueError)

_SRGB_GAMMA = 45_455
_SRGB_CHROMATICITIES = (31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)
"""White, red, green and blue, x and y, in 1/100,000 (PNG specification, 11.3.2.1)."""

_SRGB_CODE_POINTS = ((1, 13), (1, 1))
"""Primaries and transfer function of sRGB in cICP, and of BT.709, which is shown alike."""


def colour_space(profile: bytes) -> str:
    """What the profile is for: "RGB", "CMYK", "GRAY"…; "" where it is no profile (ICC.1, 7.2)."""
    if len(profile) < 132 or profile[36:40] != b"acsp":
        return ""
    (size,) = struct.unpack_from(">I", profile)
    return profile[16:20].decode("latin-1").strip() if 132 <= size <= len(profile) else ""


def kept_profile(profile: bytes) -> bytes:
    """The profile where a result may carry it, else nothing."""
    if len(profile) > MAX_KEPT_BYTES or colour_space(profile) != "RGB" or not _opened(profile):
        return b""
    (size,) = struct.unpack_from(">I", profile)
    return profile[:size]


def inks_to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """CMYK as sRGB, by perceptual intent; None where the profile does not do."""
    return _to_srgb(image, profile) if colour_space(profile) == "CMYK" else None


def greys_to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Mode L or LA with the greys of sRGB; None where the profile does not do."""
    if colour_space(profile) != "GRAY":
        return None
    ramp = _to_srgb(Image.frombytes("L", (256, 1), bytes(range(256))), profile)
    if ramp is None:
        return None
    # One table for all pixels keeps greys neutral, and takes no memory.
    table = [*ramp.getchannel("G").tobytes()]
    if image.mode == "LA":
        return Image.merge("LA", (image.getchannel("L").point(table), image.getchannel("A")))
    return image.point(table)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    opened = _opened(profile)
    if opened is None:
        return None
    try:
        return ImageCms.profileToProfile(
            image, opened, _SRGB, ImageCms.Intent.PERCEPTUAL, outputMode="RGB"
        )
    except _CMS_FAULTS:
        return None


def _opened(profile: bytes) -> ImageCms.ImageCmsProfile | None:
    if len(profile) > MAX_USED_BYTES:
        return None
    try:
        return ImageCms.ImageCmsProfile(BytesIO(profile))
    except _CMS_FAULTS:
        return None


def profile_of_png(chunks: Mapping[bytes, bytes]) -> bytes:
    """The ICC profile in an iCCP chunk; nothing where there is none or it cannot be unpacked."""
    _name, _, packed = chunks.get(b"iCCP", b"").partition(b"\0")
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(packed[1:], MAX_USED_BYTES + 1)
    except zlib.error:
        return b""
    return profile if unpacking.eof else b""


def is_srgb(chunks: Mapping[bytes, bytes]) -> bool:
    """Whether PNG's own colour chunks, an iCCP aside, mean what a PNG without any is shown as.

    The first that there is decides: cICP, sRGB, then gAMA and cHRM (PNG specification, 4.3).
    """
    if coding := chunks.get(b"cICP"):
        return tuple(coding[:2]) in _SRGB_CODE_POINTS
    if chunks.get(b"sRGB"):
        return True
    gamma = chunks.get(b"gAMA", b"")
    if len(gamma) == 4 and abs(struct.unpack(">I", gamma)[0] - _SRGB_GAMMA) > 1_000:
        return False
    places = chunks.get(b"cHRM", b"")
    if len(places) != 32:
        return True
    pairs = zip(struct.unpack(">8I", places), _SRGB_CHROMATICITIES, strict=True)
    return all(abs(found - expected) <= 1_000 for found, expected in pairs)
