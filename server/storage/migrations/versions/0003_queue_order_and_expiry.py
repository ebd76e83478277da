"""Turns and priorities of waiting jobs, expiry of ended ones; ids of 64 bits on PostgreSQL."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

UNEXPIRED = sa.text("expired_at IS NULL")


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":  # SQLite's integers are wide enough
        op.alter_column("jobs", "id", type_=sa.BigInteger())
        op.alter_column("deliveries", "job_id", type_=sa.BigInteger())
        op.execute("ALTER SEQUENCE jobs_id_seq AS bigint")
    op.add_column("jobs", sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("turn", sa.BigInteger(), server_default="0", nullable=False))
    op.create_index("jobs_in_order", "jobs", ["state", sa.text("priority DESC"), "turn", "id"])
    op.create_index("jobs_of_key", "jobs", ["key_id", "state"])
    op.create_index("jobs_by_turn", "jobs", ["priority", "turn"])
    op.create_index("jobs_by_turn_of_key", "jobs", ["key_id", "priority", "turn"])
    op.add_column("jobs", sa.Column("expired_at", sa.Float(), nullable=True))
    op.create_index(
        "jobs_unexpired",
        "jobs",
        ["state", "finished_at"],
        sqlite_where=UNEXPIRED,
        postgresql_where=UNEXPIRED,
    )
    op.create_index("jobs_by_end", "jobs", ["finished_at"])


def downgrade() -> None:
    op.drop_index("jobs_by_end", "jobs")
    op.drop_index("jobs_unexpired", "jobs")
    op.drop_column("jobs", "expired_at")
    for name in ("jobs_by_turn_of_key", "jobs_by_turn", "jobs_of_key", "jobs_in_order"):
        op.drop_index(name, "jobs")
    op.drop_column("jobs", "turn")
    op.drop_column("jobs", "priority")
    if op.get_context().dialect.name == "postgresql":
        op.execute("ALTER SEQUENCE jobs_id_seq AS integer")
        op.alter_column("deliveries", "job_id", type_=sa.Integer())
        op.alter_column("jobs", "id", type_=sa.Integer())
