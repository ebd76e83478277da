"""`KeyRing`: authentication and rate limits, with the keys of settings, key file and database.

The keys are in memory and are read again every `REFRESH_S`. A request costs a hash and a
constant-time comparison, and a new or revoked key takes effect within seconds.
"""

import base64
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
from server.api.bodies import is_absent
from server.core.errors import InvalidApiKey, RateLimited
from server.core.logs import redact_secrets
from server.core.rate_limits import TokenBuckets
from server.core.settings.sections import AuthSettings
from server.core.settings.values import MAX_KEY_CHARS, MIN_KEY_CHARS
from server.egress.policy import EgressGrant

ANONYMOUS = "anonymous"
"""Key id of all callers of a server without keys."""

REFRESH_S = 2.0
"""Seconds between two readings of the keys."""

HEAD_CHARS = 8
"""Length of the head of a digest by which candidates are found; it reveals nothing of the key."""

MAX_TRUSTED = 10_000
"""Most pairs of client network and key that are remembered as valid."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated sender of a request.

    key_id: the owner of its jobs. key_digest: digest of the key in the request.
    """

    key_id: str
    limits: KeyLimits = KeyLimits()
    key_digest: str = field(default="", compare=False, repr=False)

    @property
    def fetch_grant(self) -> EgressGrant:
        """The addresses that this caller's images may come from."""
        return EgressGrant(self.key_id, self.limits.fetch_networks, self.limits.fetch_hosts)

    @property
    def webhook_grant(self) -> EgressGrant:
        """The addresses that this caller's webhooks may go to."""
        return EgressGrant(self.key_id, self.limits.webhook_networks, self.limits.webhook_hosts)


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A valid key in memory. expires_at: seconds since the epoch."""

    digest: str
    caller: Caller
    expires_at: float | None = None


class KeyRing:
    """All valid keys, and the token buckets of calls and of wrong keys.

    A server without any key is open, where `is_open_allowed` permits it: rows deleted from the
    database must not open a server that other machines can reach.
    `refresh` may run in any thread; the rest is for the event loop. clock: seconds since the epoch.
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

        A missing key file counts as empty. Raises: OSError, ValueError for a key file that cannot
        be used; sqlalchemy.exc.SQLAlchemyError.
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
        # `_is_open` is assigned first, so that no request between the two finds an open server
        # whose keys are known already.
        has_keys = bool(known or stored or self._settings.keys_file)
        self._is_open = self._is_open_allowed and not has_keys
        self._known = dict(by_head)
        self._callers = {each.caller.key_id: each.caller for each in known}

    @property
    def serves_loopback_only(self) -> bool:
        """Whether the server is open to its own machine, but to no other."""
        return self._is_open and not self._settings.allow_anonymous

    def admit(self, key: str | None, address: str) -> Caller:
        """The caller behind a key, within its rate limits. address: of the client.

        A wrong key takes a token from the client's network. While the network has none left, only
        keys that were valid from there before are checked. So keys cannot be guessed quickly, and
        other clients of the network are not locked out.

        Raises: InvalidApiKey for unknown, expired and revoked keys alike; RateLimited.
        """
        if self._is_open:
            return Caller(ANONYMOUS)
        if not key or len(key) > MAX_KEY_CHARS:
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
        """The holder of a key id with its present limits; the defaults once its keys have ended."""
        return self._callers.get(key_id, Caller(key_id))

    def _find(self, digest: str) -> Caller | None:
        # Constant-time compare of all candidates, so that the time reveals nothing of the digests.
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
    """The network that counts as one client: an IPv4 address, the /64 of an IPv6 address."""
    address = plain_address(address)
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


def plain_address(address: str) -> str:
    """An address without IPv6 mapping: `1.2.3.4` for `::ffff:1.2.3.4` of a dual-stack socket."""
    try:
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
    except ValueError:
        return address
    return address if mapped is None else str(mapped)


def read_keys_file(path: Path) -> list[str]:
    """Keys of a file, one a line; lines that start with # are comments.

    Raises: OSError; ValueError for a file that others may read or its group may write, and for a
        key that is too short or too long.
    """
    if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ValueError(f"{path} holds API keys and others may read or write it: chmod 600")
    lines = [line.strip() for line in path.read_text().splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if any(len(key) < MIN_KEY_CHARS for key in keys):
        raise ValueError(f"{path} holds an API key of less than {MIN_KEY_CHARS} characters")
    if any(len(key) > MAX_KEY_CHARS for key in keys):
        raise ValueError(f"{path} holds an API key of more than {MAX_KEY_CHARS} characters")
    return keys


def key_in_headers(headers: Mapping[str, str]) -> str | None:
    """The API key: `key`, `X-API-Key`, or `Authorization`; None without one.

    The first two come before the third, which some clients and proxies fill on their own.
    """
    named = (headers.get("key"), headers.get("x-api-key"), authorization_key(headers))
    return next((key.strip() for key in named if key and not is_absent(key)), None)


def is_in_basic(key: str | None, headers: Mapping[str, str]) -> bool:
    """Whether a key is that of `Basic`, which browsers store and send on their own."""
    is_basic = headers.get("authorization", "").strip()[:6].lower() == "basic "
    return is_basic and key == (authorization_key(headers) or "").strip()


def authorization_key(headers: Mapping[str, str]) -> str | None:
    """The key in `Authorization`: a bearer token, a bare key, or the password of `Basic`.

    A client that has no field for a password sends the key as the user name.
    """
    scheme, _, rest = headers.get("authorization", "").strip().partition(" ")
    match scheme.lower():
        case "bearer" | "token":
            return rest
        case "basic":
            with suppress(ValueError):
                user, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
                return password or user
            return None
    return None if rest else scheme
