"""The columns of a job's lease get their usual names."""

from alembic import op

revision = "0011"
down_revision = "0010"

NAMES = {"claim": "fencing_token", "beaten_at": "heartbeat_at"}


def upgrade() -> None:
    for old, new in NAMES.items():
        op.execute(f"ALTER TABLE jobs RENAME COLUMN {old} TO {new}")


def downgrade() -> None:
    for old, new in NAMES.items():
        op.execute(f"ALTER TABLE jobs RENAME COLUMN {new} TO {old}")
