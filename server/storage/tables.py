"""The database's tables. Migrations in `migrations/` bring an older schema to this one."""

import json
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    text,
)

metadata = MetaData()

# Float is double precision in both databases. JSON rather than JSONB: JSON keeps a text unchanged
# and accepts the escaped NUL that a prompt may hold.
Id = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows for INTEGER only


class JsonScalar(TypeDecorator[Any]):
    """Any JSON value, kept as text.

    In a column of type JSON, SQLite would convert a lone number: 1.0 would come back as 1, and an
    integer beyond 64 bits as a float.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        return json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


jobs = Table(
    "jobs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("state", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("dialect", Text, nullable=False),
    Column("request", JSON, nullable=False),
    Column("params", JSON, nullable=False),
    Column("file_prefix", Text, nullable=False, unique=True),
    Column("work", Float, nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("turn", BigInteger, nullable=False, server_default="0"),
    Column("webhook", Text),
    Column("track_id", JsonScalar),
    Column("created_at", Float, nullable=False),
    Column("submitted_s", Float),
    Column("queued_s", Float),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("attempt", Integer, nullable=False, default=0),
    Column("fencing_token", Integer, nullable=False, server_default="0"),
    Column("worker_id", Text),
    Column("heartbeat_at", Float),
    Column("step", Integer, nullable=False, default=0),
    Column("total_steps", Integer, nullable=False, default=0),
    Column("preview_step", Integer),
    Column("run_s", Float),
    Column("flagged", JSON),
    Column("error", Text),
    Column("expired_at", Float),
    Column("deadline_at", Float),
    Column("traceparent", Text),
    CheckConstraint(
        "state IN ('queued', 'running', 'finished', 'failed', 'cancelled')", name="state_known"
    ),
    CheckConstraint(
        "(state = 'running') = (worker_id IS NOT NULL AND heartbeat_at IS NOT NULL)",
        name="running_has_lease",
    ),
    CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="failed_has_error"),
    # Clients keep ids, so an id must never be used twice, even after the newest row is deleted.
    sqlite_autoincrement=True,
)


Index("jobs_by_state", jobs.c.state, jobs.c.id)


Index("jobs_by_key", jobs.c.key_id, jobs.c.id)


# For `jobs/fair_queue.py`: the next job, and the position of a new one.
Index("jobs_in_order", jobs.c.state, jobs.c.priority.desc(), jobs.c.turn, jobs.c.id)


Index("jobs_of_key", jobs.c.key_id, jobs.c.state)


Index("jobs_by_turn", jobs.c.priority, jobs.c.turn)


Index("jobs_by_turn_of_key", jobs.c.key_id, jobs.c.priority, jobs.c.turn)


# For `jobs/retention.py`: pictures and rows that are old enough to remove.
UNEXPIRED = text("expired_at IS NULL")


Index(
    "jobs_unexpired",
    jobs.c.state,
    jobs.c.finished_at,
    sqlite_where=UNEXPIRED,
    postgresql_where=UNEXPIRED,
)


Index("jobs_by_end", jobs.c.finished_at)


receipts = Table(
    "receipts",
    metadata,
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("receipt", JSON, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("body_sha256", Text, nullable=False),
    # Deferred, because the key is reserved before the job's row is written.
    Column(
        "file_prefix",
        Text,
        ForeignKey("jobs.file_prefix", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        nullable=False,
    ),
    Column("created_at", Float, nullable=False),
)


Index("idempotency_keys_by_age", idempotency_keys.c.created_at)


Index("idempotency_keys_by_job", idempotency_keys.c.file_prefix)


deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("url", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="state_known"),
)


Index("deliveries_by_job", deliveries.c.job_id)


Index("deliveries_due", deliveries.c.state, deliveries.c.due_at)


delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("delivery_id", Text, ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("duration_s", Float, nullable=False),
    Column("status", Integer),
    Column("outcome", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("device", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("seen_at", Float, nullable=False),
    CheckConstraint("state IN ('loading', 'ready', 'failed')", name="state_known"),
)

# Apart from `workers`, whose rows every claim reads.
worker_figures = Table(
    "worker_figures",
    metadata,
    Column("worker_id", Text, ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True),
    Column("figures", Text, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("requests_per_minute", Integer),
    Column("max_waiting", Integer),
    Column("priority", Integer, nullable=False),
    Column("hold_s", Float),
    Column("fetch_networks", JSON, nullable=False),
    Column("fetch_hosts", JSON),
    Column("webhook_networks", JSON),
    Column("webhook_hosts", JSON),
    Column("force_safety_checker", Boolean, nullable=False),
)
