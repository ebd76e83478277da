"""Requests that are sent again: a client's key names the job that its first request made.

The row is written in the transaction that makes the job durable. Submits run one after the other,
so that the second of two requests that come at the same moment finds the first one's. A row's age
is measured by a `DatabaseClock`: a jump of the wall clock must not make a job a second time.
"""

from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from server.core.errors import Conflict, ConflictKind
from server.storage.tables import idempotency_keys

KEPT_S = 86_400.0
"""How long a key is remembered."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """key: the client's, unique among its own. body_sha256: of what it asked for with it."""

    key: str
    body_sha256: str


def find(connection: Connection, key_id: str, once: Idempotency, now: float) -> str | None:
    """File prefix of the job that an earlier request with this key made.

    Raises: Conflict when that request asked for something else.
    """
    row = connection.execute(
        select(idempotency_keys.c.body_sha256, idempotency_keys.c.file_prefix).where(
            idempotency_keys.c.key_id == key_id,
            idempotency_keys.c.key == once.key,
            idempotency_keys.c.created_at > now - KEPT_S,
        )
    ).one_or_none()
    if row is None:
        return None
    if row.body_sha256 != once.body_sha256:
        raise Conflict(ConflictKind.IDEMPOTENCY_KEY_REUSED)
    return str(row.file_prefix)


def reserve(
    connection: Connection, key_id: str, once: Idempotency, file_prefix: str, now: float
) -> None:
    """Take the key for the job of this file prefix, where `find` has found none."""
    connection.execute(
        delete(idempotency_keys).where(idempotency_keys.c.created_at <= now - KEPT_S)
    )
    connection.execute(
        insert(idempotency_keys).values(
            key_id=key_id,
            key=once.key,
            body_sha256=once.body_sha256,
            file_prefix=file_prefix,
            created_at=now,
        )
    )
