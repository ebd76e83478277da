"""The commands `inpaint-server keys create | list | revoke | rotate`.

Only a new key goes to standard output, for scripts; sentences for people go to standard error.
"""

import argparse
import sys
import time
from dataclasses import fields
from datetime import UTC, datetime

from server.api.auth.keys import KeyLimits, KeyStore, StoredKey
from server.core.settings import Settings
from server.core.terminal import print_table, printable
from server.storage.database import open_migrated

COLUMNS = ("id", "name", "key", "state", "created", "expires", "limits")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run one of the commands. Returns the exit status. Raises: ValueError."""
    engine = open_migrated(settings.sqlalchemy_url)
    commands = {"create": create, "list": list_keys, "revoke": revoke, "rotate": rotate}
    try:
        return commands[options.verb](KeyStore(engine), options)
    finally:
        engine.dispose()


def create(store: KeyStore, options: argparse.Namespace) -> int:
    """Create a holder with its first key."""
    limits = KeyLimits(
        requests_per_minute=options.requests_per_minute,
        max_waiting=options.max_waiting,
        priority=options.priority,
        hold_s=options.hold,
        fetch_networks=tuple(options.fetch_network),
        fetch_hosts=tuple(options.fetch_host),
        webhook_networks=tuple(options.webhook_network),
        webhook_hosts=tuple(options.webhook_host),
        force_safety_checker=options.force_safety_checker,
    )
    print_key(*store.create(options.name, limits, options.expires_in))
    return 0


def rotate(store: KeyStore, options: argparse.Namespace) -> int:
    """Create a holder's next key; the present ones expire after the overlap. Raises: ValueError."""
    try:
        created = store.rotate(options.key_id, options.overlap)
    except LookupError as error:
        raise ValueError(error.args[0]) from error
    print_key(*created)
    return 0


def revoke(store: KeyStore, options: argparse.Namespace) -> int:
    """Revoke a holder's keys; running servers refuse them within seconds."""
    count = store.revoke(options.key_id)
    if count:
        print(f"{count} revoked")  # noqa: T201 - the command's output
        return 0
    is_known = any(key.key_id == options.key_id for key in store.list_keys())
    reason = "is revoked already" if is_known else "is not the id of a key; `keys list` shows them"
    print(f"error: {options.key_id!r} {reason}", file=sys.stderr)  # noqa: T201
    return 1


def list_keys(store: KeyStore, _options: argparse.Namespace) -> int:
    """Print a line for each key."""
    now = time.time()
    rows = [row_of(key, now) for key in store.list_keys()]
    print_table(COLUMNS, rows, empty="no keys yet: `inpaint-server keys create NAME` makes one")
    return 0


def print_key(key: str, stored: StoredKey) -> None:
    """Print a new key, which cannot be shown again."""
    name = printable(stored.name)
    print(f"{name}, id {stored.key_id}; it is not shown again:", file=sys.stderr)  # noqa: T201
    print(key)  # noqa: T201 - the command's output


def row_of(key: StoredKey, now: float) -> tuple[str, ...]:
    """The columns of a key in the list."""
    state = "revoked" if key.revoked_at else "valid" if key.is_valid(now) else "expired"
    limits = " ".join(
        f"{each.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for each in fields(key.limits)
        if (value := getattr(key.limits, each.name)) != each.default
    )
    head = key.key_id, key.name, f"{key.prefix}…", state
    return *head, to_minute(key.created_at), to_minute(key.expires_at), limits or "-"


def to_minute(time_s: float | None) -> str:
    """Seconds since the epoch as date and time in UTC; "-" for None."""
    return "-" if time_s is None else datetime.fromtimestamp(time_s, UTC).isoformat("T", "minutes")
