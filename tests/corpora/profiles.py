"""ICC profiles of version 2, made here and as small as can be: RGB, grey, and ink (ICC.1:2001)."""

import struct
from collections.abc import Mapping

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
P3_COLOURANTS = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
"""Display P3's primaries as seen under D50."""


def profile(space: bytes, device: bytes, pcs: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A profile with these tags. space, device, pcs: four letters each."""
    names = [*tags]
    at, directory, bodies = 128 + 4 + 12 * len(names), b"", b""
    for name in names:
        body = tags[name] + bytes(-len(tags[name]) % 4)
        directory += name + struct.pack(">II", at + len(bodies), len(tags[name]))
        bodies += body
    header = struct.pack(">I4sI4s4s4s", at + len(bodies), b"none", 0x02400000, device, space, pcs)
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + xyz(D50)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(names)) + directory + bodies


def xyz(value: tuple[float, float, float]) -> bytes:
    """XYZType."""
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(each * 65_536) for each in value))


def gamma(exponent: float) -> bytes:
    """CurveType with one value."""
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def described(text: bytes) -> dict[bytes, bytes]:
    """What every profile has."""
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + bytes(1 + 78)
    return {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(D50)}


def display_p3(padding: int = 0) -> bytes:
    """Wide RGB of gamma 2.2. padding: bytes of a tag that nobody reads."""
    curves = {name: gamma(2.2) for name in (b"rTRC", b"gTRC", b"bTRC")}
    colourants = {name: xyz(value) for name, value in P3_COLOURANTS.items()}
    more = {b"pad ": b"data\0\0\0\0" + bytes(padding)} if padding else {}
    tags = {**described(b"P3-like"), **colourants, **curves, **more}
    return profile(b"RGB ", b"mntr", b"XYZ ", tags)


def grey(exponent: float) -> bytes:
    """Grey of one gamma."""
    tags = {**described(b"grey"), b"kTRC": gamma(exponent)}
    return profile(b"GRAY", b"mntr", b"XYZ ", tags)


def ink(grid: int = 2, outputs: int = 3) -> bytes:
    """CMYK that is lighter than the plain conversion: half of the ink's effect, and no colour.

    grid, outputs: of the table, as the profile claims them.
    """
    steps = np.arange(256, dtype=np.uint8).tobytes()
    corners = [255 - 32 * bin(corner).count("1") for corner in range(16)]
    table = b"".join(bytes([level, 128, 128]) for level in corners)
    identity = struct.pack(">9i", *(65_536 * (each % 4 == 0) for each in range(9)))
    body = b"mft1\0\0\0\0" + bytes([4, outputs, grid, 0]) + identity + steps * 4 + table + steps * 3
    return profile(b"CMYK", b"prtr", b"Lab ", {**described(b"ink"), b"A2B0": body})
