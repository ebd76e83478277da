"""The outbox: a job's webhook call is a row, written in the transaction that ends the job.

A crash after that transaction therefore loses no call. `webhooks/deliveries.py` reads the rows.
"""

import uuid
from enum import StrEnum
from urllib.parse import urlsplit

from sqlalchemy import (
    Connection,
    insert,
)

from server.storage.tables import deliveries

RETRY_DELAYS_S = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""After the first attempt, the second, …: ten attempts over about three days."""

JITTER = 0.2

MAX_AGE_S = sum(RETRY_DELAYS_S) * (1 + JITTER)
"""From the job's end. A call to a host that keeps failing is then given up, whatever attempts are
left, and a pending call no longer keeps the job's pictures and row."""

DEFAULT_PORTS = {"http": 80, "https": 443}

AT_ONCE = 0.0
"""The due time of a first attempt and of a requested redelivery."""


class DeliveryState(StrEnum):
    """The state of a webhook call."""

    PENDING = "pending"
    """Not received yet; another attempt is scheduled."""
    DELIVERED = "delivered"
    """The receiver answered 2xx."""
    DEAD = "dead"
    """Given up: the receiver answered 410, or the schedule is used up."""


def queue_delivery(connection: Connection, job_id: int, key_id: str, url: str, now: float) -> None:
    """Write a job's webhook call, due at once. connection: in the transaction that ends the job."""
    connection.execute(
        insert(deliveries).values(
            id=f"msg_{uuid.uuid4().hex}",
            job_id=job_id,
            url=url,
            host=host_of(key_id, url),
            state=DeliveryState.PENDING,
            attempt=0,
            due_at=AT_ONCE,
            created_at=now,
        )
    )


def host_of(key_id: str, url: str) -> str:
    """Key, scheme, host and port: what concurrency limit and circuit breaker of a call belong to.

    The key is part of it, so that one key's failing URLs cannot stop another key's calls to the
    same host. Never raises, because that would keep a job from ending.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return key_id
    return f"{key_id} {parts.scheme}://{parts.hostname}:{port}"


def key_of(host: str) -> str:
    """The key in a `host_of`."""
    return host.partition(" ")[0]
