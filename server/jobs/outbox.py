"""The outbox: a job's webhook call is a row written in the transaction that ends the job."""

import uuid
from enum import StrEnum
from urllib.parse import urlsplit

from sqlalchemy import (
    Connection,
    insert,
)

from server.storage.tables import deliveries

RETRY_DELAYS_S = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""After the first try, the second, …: ten tries over about three days."""

JITTER = 0.2

MAX_AGE_S = sum(RETRY_DELAYS_S) * (1 + JITTER)
"""From the job's end: after that a call to a host that always fails is given up, tries left or not,
and a call that is still pending keeps neither the job's pictures nor its row."""

DEFAULT_PORTS = {"http": 80, "https": 443}

AT_ONCE = 0.0
"""The due time of a call that was not tried, or is asked for again."""


class DeliveryState(StrEnum):
    """Where a webhook call is."""

    PENDING = "pending"
    """Not received yet; another try is due."""
    DELIVERED = "delivered"
    """The receiver answered 2xx."""
    DEAD = "dead"
    """Given up: the receiver is gone for good, or the schedule is used up."""


def queue_delivery(connection: Connection, job_id: int, key_id: str, url: str, now: float) -> None:
    """Write a job's webhook call in the transaction that ends the job, due at once."""
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
    """What a call counts against: key, scheme, host and port.

    Of one key, so that nobody can hold up another's calls to a host by addresses of it that fail.
    Never fails, as it stands on the way of a job's end.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return key_id
    return f"{key_id} {parts.scheme}://{parts.hostname}:{port}"
