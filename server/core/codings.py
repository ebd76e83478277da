"""Decoding of HTTP content codings, gzip and deflate, chunk by chunk."""

import zlib
from collections.abc import Iterator

CODINGS = ("gzip", "x-gzip", "deflate")

GZIP_OR_ZLIB, RAW_DEFLATE = 47, -15
"""Values of zlib's `wbits`. Some clients send "deflate" as a raw stream without zlib's header."""

CHUNK_BYTES = 1_000_000
"""Size of a decoded chunk. The caller checks its limit between chunks, so that a decompression bomb
never fills the memory."""


def inflate(body: bytes) -> Iterator[bytes]:
    """Decoded chunks of a body in any of `CODINGS`.

    Raises: zlib.error, also for a truncated body.
    """
    is_zlib = body[:1] != b"" and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    is_raw = not is_zlib and not body.startswith(b"\x1f\x8b")
    stream = zlib.decompressobj(RAW_DEFLATE if is_raw else GZIP_OR_ZLIB)
    while not stream.eof:
        chunk = stream.decompress(body, CHUNK_BYTES)
        body = stream.unconsumed_tail
        if not chunk and not body and not stream.eof:
            raise zlib.error("the end is missing")
        yield chunk
