"""API keys: who may call, and whose a job is."""

import hashlib
import hmac
from collections.abc import Sequence

from pydantic import SecretStr

from server.errors import InvalidApiKey

ANONYMOUS = "anonymous"
"""Key id of every caller of a server without keys."""


class KeyRing:
    """The keys of the settings, as SHA-256 digests.

    No keys at all means an open server; `Settings` allows that on loopback only.
    """

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [digest_of(key.get_secret_value()) for key in keys]

    def key_id(self, key: str | None) -> str:
        """The id of a caller's key: the head of its digest, good for rows and logs.

        Raises: InvalidApiKey.
        """
        if not self._digests:
            return ANONYMOUS
        given = digest_of(key or "")
        # All are compared, so that the time taken says nothing about which was near.
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        if not any(matches):
            raise InvalidApiKey
        return given[:12]


def digest_of(key: str) -> str:
    """SHA-256 in hexadecimal; keys are long and random, so nothing slower is needed."""
    return hashlib.sha256(key.encode()).hexdigest()
