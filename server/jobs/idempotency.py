"""Idempotency keys: a repeated request gets the job of the first request with the same key.

The row is written in the transaction that makes the job durable. Submits run one after the other,
so the second of two simultaneous requests finds the row of the first. A `DatabaseClock` measures a
row's age, because a jump of the wall clock must not create a job twice.
"""

from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from server.core.errors import Conflict, ConflictKind
from server.storage.tables import idempotency_keys

KEPT_S = 86_400.0
"""How long an idempotency key is kept."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """key: chosen by the client, unique per API key. body_sha256: of the request's body."""

    key: str
    body_sha256: str


def find(connection: Connection, key_id: str, once: Idempotency, now: float) -> str | None:
    """File prefix of the job of an earlier request with this key.

    Raises: Conflict when that request had another body.
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
    """Store the key for the job with this file prefix, after `find` has returned None."""
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
