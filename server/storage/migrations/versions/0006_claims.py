"""A number for every claim, and beats that are compared with each other instead of with a clock."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("claim", sa.Integer(), server_default="0", nullable=False))
    # Pictures are named after it: those there are were named after the attempt.
    op.execute("UPDATE jobs SET claim = attempt")
    # In SQL, as both databases change the CHECK constraint with it.
    op.execute("ALTER TABLE jobs RENAME COLUMN lease_until TO beaten_at")


def downgrade() -> None:
    op.execute("ALTER TABLE jobs RENAME COLUMN beaten_at TO lease_until")
    op.drop_column("jobs", "claim")
