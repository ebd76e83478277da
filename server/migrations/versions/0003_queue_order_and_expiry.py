"""Ids of 64 bits on PostgreSQL."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":  # SQLite's integers are wide enough
        op.alter_column("jobs", "id", type_=sa.BigInteger())
        op.alter_column("deliveries", "job_id", type_=sa.BigInteger())
        op.execute("ALTER SEQUENCE jobs_id_seq AS bigint")


def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("ALTER SEQUENCE jobs_id_seq AS integer")
        op.alter_column("deliveries", "job_id", type_=sa.Integer())
        op.alter_column("jobs", "id", type_=sa.Integer())
