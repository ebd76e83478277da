"""What two headers of HTTP say: `Host`, which may be forged, and `Content-Encoding`.

The `Host` header is checked against DNS rebinding and forged URLs in answers. The content codings
gzip and deflate are decoded chunk by chunk.
"""

import functools
import re
import zlib
from collections.abc import Iterator

HOST = re.compile(r"(?P<name>[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(:(?P<port>[0-9]{1,5}))?")
"""A well formed Host header, in lower case."""

MAX_PORT = 65_535

KNOWN_HOSTS = 64
"""Headers whose result is cached. The cache is small, because a header may have 8 kB."""


@functools.lru_cache(KNOWN_HOSTS)
def is_allowed(host: bytes, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header is well formed and names an allowed host.

    allowed: names, or patterns such as `*.example`; empty allows all. Answers build URLs from it.
    """
    match = HOST.fullmatch(host.decode("latin-1").lower())
    if match is None:
        return False
    name = match["name"]
    return not allowed or any(
        name == each or (each.startswith("*.") and name.endswith(each[1:])) for each in allowed
    )


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
