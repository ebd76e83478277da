"""Content codings of HTTP bodies that are undone: gzip and deflate, piece by piece."""

import zlib
from collections.abc import Iterator

CODINGS = ("gzip", "x-gzip", "deflate")

GZIP_OR_ZLIB, RAW_DEFLATE = 47, -15
"""zlib's `wbits`. Some senders mean a bare stream by "deflate", without zlib's head."""

PIECE_BYTES = 1_000_000
"""Of a body that is being inflated; its limit is looked at before the next one."""


def inflate(body: bytes) -> Iterator[bytes]:
    """The pieces of a compressed body, whichever of the codings it has.

    Raises: zlib.error, also where the end is missing.
    """
    is_zlib = body[:1] != b"" and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    is_raw = not is_zlib and not body.startswith(b"\x1f\x8b")
    stream = zlib.decompressobj(RAW_DEFLATE if is_raw else GZIP_OR_ZLIB)
    while not stream.eof:
        piece = stream.decompress(body, PIECE_BYTES)
        body = stream.unconsumed_tail
        if not piece and not body and not stream.eof:
            raise zlib.error("the end is missing")
        yield piece
