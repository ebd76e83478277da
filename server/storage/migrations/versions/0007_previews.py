"""Previews of running jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("preview_step", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "preview_step")
