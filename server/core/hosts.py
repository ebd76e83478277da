"""Checks of the `Host` header, against DNS rebinding and forged URLs in answers."""

import functools
import re

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
