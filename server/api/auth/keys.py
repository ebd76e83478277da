"""`KeyStore`: API keys as rows, written by `inpaint-server keys` and read by running servers.

A key is 32 random bytes, shown once when it is created. Its row holds the SHA-256 digest. A slow
password hash is not needed for a long random key, and would let wrong keys keep the server busy.

A row is one secret. The rows of one `key_id` belong to one holder and share its jobs. Rotation adds
a row and ends the older ones after an overlap.
"""

import hashlib
import ipaddress
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine, Row, func, insert, or_, select, update

from server.storage.database import read_only
from server.storage.tables import api_keys

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

KEY_PREFIX = "sd_"
LISTS_OF_NETWORKS = ("fetch_networks", "webhook_networks")
LISTS_OF_HOSTS = ("fetch_hosts", "webhook_hosts")
"""Limits that are lists. NULL is an empty list, as an earlier release leaves the column."""

PREFIX_CHARS = 9
"""Length of the head of a key that lists show: `sd_` and 6 of its 43 random characters."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits and grants of a key. None means the server's own limit, or no limit.

    requests_per_minute: rate limit of API calls, polls included.
    max_waiting: jobs of this key that may wait at a time.
    priority: of its jobs in the queue; higher goes first.
    hold_s: how long its V3 calls wait before they are answered "processing".
    fetch_networks, fetch_hosts: where its images may come from, in addition to the settings.
    webhook_networks, webhook_hosts: where its webhooks may go, in addition to the settings.
    force_safety_checker: its pictures are always checked.
    """

    requests_per_minute: int | None = None
    max_waiting: int | None = None
    priority: int = 0
    hold_s: float | None = None
    fetch_networks: tuple[IpNetwork, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    webhook_networks: tuple[IpNetwork, ...] = ()
    webhook_hosts: tuple[str, ...] = ()
    force_safety_checker: bool = False

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1")
        if self.hold_s is not None and not 0 <= self.hold_s < math.inf:
            raise ValueError("the hold must be 0 s or more")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A row. Times are seconds since the epoch.

    digest: SHA-256 of the key in hexadecimal. prefix: the head of the key, for lists.
    """

    digest: str
    key_id: str
    name: str
    prefix: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    limits: KeyLimits

    def is_valid(self, now: float) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyStore:
    """All access to key rows. Synchronous; safe to call from several threads and processes.

    clock: seconds since the epoch.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def create(
        self, name: str, limits: KeyLimits | None = None, lifetime_s: float | None = None
    ) -> tuple[str, StoredKey]:
        """Create a holder. Returns the key, which is stored nowhere, and its row."""
        now = self._clock()
        expires_at = None if lifetime_s is None else now + lifetime_s
        return self._insert(secrets.token_hex(6), name, expires_at, limits or KeyLimits())

    def rotate(self, key_id: str, overlap_s: float) -> tuple[str, StoredKey]:
        """Create the next key of a holder, and let its present keys expire after the overlap.

        The new key expires when the newest present key would have. Raises: LookupError where the
        holder has no valid key.
        """
        now = self._clock()
        valid = [key for key in self.list_keys() if key.key_id == key_id and key.is_valid(now)]
        if not valid:
            raise LookupError(f"no valid key has the id {key_id}")
        newest = valid[-1]
        created = self._insert(key_id, newest.name, newest.expires_at, newest.limits)
        until = now + overlap_s
        with self._engine.begin() as connection:
            connection.execute(
                update(api_keys)
                .where(
                    api_keys.c.digest.in_([key.digest for key in valid]),
                    or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > until),
                )
                .values(expires_at=until)
            )
        return created

    def revoke(self, key_id: str) -> int:
        """Revoke all keys of a holder. Returns their number."""
        with self._engine.begin() as connection:
            return connection.execute(
                update(api_keys)
                .where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=self._clock())
            ).rowcount

    def list_keys(self) -> list[StoredKey]:
        """All rows, oldest first, expired and revoked ones included."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.digest)
        with read_only(self._engine) as connection:
            return [to_stored_key(row) for row in connection.execute(query)]

    def has_keys(self) -> bool:
        """Whether any key was ever created: revoking the last one must not open the server."""
        with read_only(self._engine) as connection:
            return bool(connection.execute(select(func.count()).select_from(api_keys)).scalar_one())

    def _insert(
        self, key_id: str, name: str, expires_at: float | None, limits: KeyLimits
    ) -> tuple[str, StoredKey]:
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        values: dict[str, Any] = asdict(limits)
        for column in LISTS_OF_NETWORKS:
            values[column] = [str(network) for network in getattr(limits, column)]
        query = insert(api_keys).values(
            digest=digest_of(key),
            key_id=key_id,
            name=name,
            prefix=key[:PREFIX_CHARS],
            created_at=self._clock(),
            expires_at=expires_at,
            **values,
        )
        with self._engine.begin() as connection:
            return key, to_stored_key(connection.execute(query.returning(api_keys)).one())


def digest_of(key: str) -> str:
    """SHA-256 in hexadecimal. A lone surrogate, which JSON can escape, counts as "?"."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def to_stored_key(row: Row[Any]) -> StoredKey:
    """A row of `api_keys`, with its limits as `KeyLimits`."""
    values = dict(row._mapping)
    limits = {name: values.pop(name) for name in KeyLimits.__dataclass_fields__}
    for name in LISTS_OF_NETWORKS:
        limits[name] = tuple(map(ipaddress.ip_network, limits[name] or ()))
    for name in LISTS_OF_HOSTS:
        limits[name] = tuple(limits[name] or ())
    return StoredKey(**values, limits=KeyLimits(**limits))
