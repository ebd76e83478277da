"""Receipts of finished jobs, idempotency keys, and a key's jobs by age."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "receipts",
        sa.Column(
            "job_id", sa.Integer().with_variant(sa.BigInteger(), "postgresql"), nullable=False
        ),
        sa.Column("receipt", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body_sha256", sa.Text(), nullable=False),
        sa.Column("file_prefix", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["file_prefix"],
            ["jobs.file_prefix"],
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("key_id", "key"),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"], unique=False)
    op.create_index("idempotency_keys_by_job", "idempotency_keys", ["file_prefix"], unique=False)
    op.create_index("jobs_by_key", "jobs", ["key_id", "id"], unique=False)


def downgrade() -> None:
    op.drop_index("jobs_by_key", "jobs")
    op.drop_table("idempotency_keys")
    op.drop_table("receipts")
