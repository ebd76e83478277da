"""When a job is no longer worth starting."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("deadline_at", sa.Float()))


def downgrade() -> None:
    op.drop_column("jobs", "deadline_at")
