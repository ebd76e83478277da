"""Names to addresses, in threads: the system's resolver can neither be awaited nor stopped.

A thread is gone until the resolver gives up, which for a name whose DNS servers are silent is long
after whoever asked has gone. So each owner has a few threads, and keeps them until they are free.
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
    """Looks names up for many owners. resolver: for tests."""

    def __init__(self, resolver: Resolver | None = None) -> None:
        self._resolver = resolver or resolve
        self._slots = FairSemaphore(THREADS, THREADS_PER_OWNER)

    async def find(self, host: str, port: int, owner: str) -> Sequence[str]:
        """The addresses of a host. Raises: TimeoutError, other OSError, UnicodeError."""
        literals = numeric_addresses(host, port)
        if literals:
            return literals
        async with asyncio.timeout(TIMEOUT_S):
            await self._slots.acquire(owner)
            look_up = functools.partial(self._resolver, host, port)
            return await self._slots.use_in_thread(owner, look_up)


def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host as the system finds them. Raises: OSError, UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def numeric_addresses(host: str, port: int) -> Sequence[str]:
    """The address a host is written as, in any form the system reads; none where it is a name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return []
    return [str(each[4][0]) for each in found]
