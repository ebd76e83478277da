"""Who calls, and what they may do: the keys of settings, key file and database as one table.

The table stands in memory and is read again every few seconds, so that a request costs a hash and
one comparison, and a key that is made or revoked counts soon.
"""

import hmac
import ipaddress
import stat
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from server.api.auth.keys import KeyLimits, KeyStore, digest_of
from server.core.errors import InvalidApiKey, RateLimited
from server.core.logs import redact_secrets
from server.core.rate_limits import TokenBuckets
from server.core.settings import MIN_KEY_CHARS, AuthSettings
from server.egress.policy import EgressGrant

ANONYMOUS = "anonymous"
"""Key id of every caller of a server without keys."""

REFRESH_S = 2.0
"""Between two readings of the keys."""

HEAD_CHARS = 8
"""Of a digest, by which candidates are found. It says nothing of the key behind it."""

MAX_TRUSTED = 10_000
"""Pairs of address and key remembered as having worked."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is.

    key_id: the owner of its jobs. key_digest: of the key that the request came with.
    """

    key_id: str
    limits: KeyLimits = KeyLimits()
    key_digest: str = field(default="", compare=False, repr=False)

    @property
    def fetch_grant(self) -> EgressGrant:
        """Where this caller's images may come from."""
        return EgressGrant(self.key_id, self.limits.fetch_networks, self.limits.fetch_hosts)

    @property
    def webhook_grant(self) -> EgressGrant:
        """Where this caller's webhooks may go."""
        return EgressGrant(self.key_id, self.limits.webhook_networks, self.limits.webhook_hosts)


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key as a request meets it. expires_at: seconds since the epoch."""

    digest: str
    caller: Caller
    expires_at: float | None = None


class KeyRing:
    """All keys, with the counters of calls and of wrong keys.

    A server without any key is open; `is_open_allowed` says whether that may be, because a row
    deleted from the database must not open a server that others can reach.
    `refresh` may run in any thread, all else belongs to the event loop. clock: epoch seconds.
    """

    def __init__(
        self,
        settings: AuthSettings,
        store: KeyStore,
        *,
        is_open_allowed: bool,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._is_open_allowed = is_open_allowed
        self._clock = clock
        self._calls = TokenBuckets(monotonic)
        self._failures = TokenBuckets(monotonic)
        self._trusted: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._known: Mapping[str, Sequence[KnownKey]] = {}
        self._callers: Mapping[str, Caller] = {}
        self._is_open = False
        self.refresh()

    def refresh(self) -> None:
        """Read the key file and the database again.

        A key file that is gone has no keys. Raises: OSError, ValueError for one that cannot be
        read; sqlalchemy.exc.SQLAlchemyError.
        """
        plain = [key.get_secret_value() for key in self._settings.keys]
        with suppress(FileNotFoundError):
            if self._settings.keys_file is not None:
                plain += read_keys_file(self._settings.keys_file)
        redact_secrets(plain)
        known = [
            KnownKey(digest, Caller(digest[:12], key_digest=digest))
            for digest in map(digest_of, plain)
        ]
        stored = self._store.list_keys()
        now = self._clock()
        known += [
            KnownKey(key.digest, Caller(key.key_id, key.limits, key.digest), key.expires_at)
            for key in stored
            if key.is_valid(now)
        ]
        by_head: dict[str, list[KnownKey]] = defaultdict(list)
        for each in known:
            by_head[each.digest[:HEAD_CHARS]].append(each)
        # Two assignments, the closing one first: no request sees an open server in between.
        has_keys = bool(known or stored or self._settings.keys_file)
        self._is_open = self._is_open_allowed and not has_keys
        self._known = dict(by_head)
        self._callers = {each.caller.key_id: each.caller for each in known}

    @property
    def serves_loopback_only(self) -> bool:
        """True while anybody on this machine may call, and nobody else is meant to."""
        return self._is_open and not self._settings.allow_anonymous

    def admit(self, key: str | None, address: str) -> Caller:
        """The caller behind a key, if they may call now. address: of the client.

        A wrong key costs its address a token; without tokens only keys that have worked from there
        are looked at, so that nobody can try keys quickly and no neighbour is locked out.

        Raises: InvalidApiKey for unknown, expired and revoked keys alike; RateLimited.
        """
        if self._is_open:
            return Caller(ANONYMOUS)
        if not key:
            raise InvalidApiKey
        digest, network = digest_of(key), network_of(address)
        is_trusted = (network, digest) in self._trusted
        limit = self._settings.wrong_keys_per_minute
        if not is_trusted and (wait_s := self._failures.wait_s(network, limit)) is not None:
            raise RateLimited(wait_s)
        caller = self._find(digest)
        if caller is None:
            self._failures.take(network, limit)
            raise InvalidApiKey
        self._trust(network, digest)
        per_minute = caller.limits.requests_per_minute
        if per_minute is not None:
            wait_s = self._calls.take(caller.key_id, per_minute)
            if wait_s is not None:
                raise RateLimited(wait_s, per_minute)
        return caller

    def is_valid(self, key_digest: str) -> bool:
        """Whether a request with this key would be admitted, but for its limits."""
        return self._is_open or self._find(key_digest) is not None

    def caller_of(self, key_id: str) -> Caller:
        """Whose jobs these are, with the limits of today: none are left of a key that has ended."""
        return self._callers.get(key_id, Caller(key_id))

    def _find(self, digest: str) -> Caller | None:
        # All candidates are compared whole, so that the time taken says nothing about them.
        matches = [
            each
            for each in self._known.get(digest[:HEAD_CHARS], ())
            if hmac.compare_digest(each.digest, digest)
        ]
        now = self._clock()
        valid = [each for each in matches if each.expires_at is None or now < each.expires_at]
        return valid[0].caller if valid else None

    def _trust(self, network: str, digest: str) -> None:
        self._trusted[network, digest] = None
        self._trusted.move_to_end((network, digest))
        if len(self._trusted) > MAX_TRUSTED:
            self._trusted.popitem(last=False)


def network_of(address: str) -> str:
    """The part of an address that stands for one client: all of IPv4, the first 64 bits of IPv6."""
    address = plain_address(address)
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


def plain_address(address: str) -> str:
    """An IPv4 address as such, where a socket of both families writes `::ffff:1.2.3.4`."""
    try:
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
    except ValueError:
        return address
    return address if mapped is None else str(mapped)


def read_keys_file(path: Path) -> list[str]:
    """Keys of a file, one a line; lines that start with # are comments.

    Raises: OSError; ValueError when others than its owner and group may read or its group write it,
        or a key is too short.
    """
    if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ValueError(f"{path} holds API keys and others may read or write it: chmod 600")
    lines = [line.strip() for line in path.read_text().splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if any(len(key) < MIN_KEY_CHARS for key in keys):
        raise ValueError(f"{path} holds an API key of less than {MIN_KEY_CHARS} characters")
    return keys
