"""When a job was submitted and how long it waited, by a clock that does not jump."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("submitted_s", sa.Float()))
    op.add_column("jobs", sa.Column("queued_s", sa.Float()))
    # Earlier releases took durations from the wall clock, which may have been turned back.
    op.execute("UPDATE jobs SET submitted_s = created_at")
    op.execute(
        "UPDATE jobs SET queued_s = CASE WHEN started_at < created_at THEN 0 "
        "ELSE started_at - created_at END"
    )
    op.execute("UPDATE jobs SET run_s = 0 WHERE run_s < 0")


def downgrade() -> None:
    op.drop_column("jobs", "queued_s")
    op.drop_column("jobs", "submitted_s")
