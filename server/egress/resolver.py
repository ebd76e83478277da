"""DNS look-ups in threads, because `getaddrinfo` blocks and cannot be cancelled.

A thread stays occupied until the system's resolver gives up. When DNS servers do not answer, that
is long after the request has timed out. Each owner may therefore occupy only a few threads, and
they count against the owner until they are free.
"""

import asyncio
import functools
import socket
from collections.abc import Callable, Sequence

from server.core.fairness import FairSemaphore

Resolver = Callable[[str, int], Sequence[str]]
"""The addresses of a host and port; may block. Raises: OSError, UnicodeError."""

TIMEOUT_S = 3.0
THREADS, THREADS_PER_OWNER = 64, 8


class NameResolver:
    """Resolves host names, with a limit of threads per owner. resolver: for tests."""

    def __init__(self, resolver: Resolver | None = None) -> None:
        self._resolver = resolver or system_addresses
        self._slots = FairSemaphore(THREADS, THREADS_PER_OWNER)

    async def resolve(self, host: str, port: int, owner: str) -> Sequence[str]:
        """The addresses of a host. Raises: TimeoutError, OSError, UnicodeError."""
        literals = numeric_addresses(host, port)
        if literals:
            return literals
        async with asyncio.timeout(TIMEOUT_S):
            await self._slots.acquire(owner)
            look_up = functools.partial(self._resolver, host, port)
            return await self._slots.use_in_thread(owner, look_up)


def system_addresses(host: str, port: int) -> Sequence[str]:
    """The addresses that the system's resolver finds; blocks. Raises: OSError, UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def numeric_addresses(host: str, port: int) -> Sequence[str]:
    """The address of a host that is a literal, in any notation of the C library; [] for a name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return []
    return [str(each[4][0]) for each in found]
