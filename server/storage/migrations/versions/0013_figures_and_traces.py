"""What workers have counted, for Prometheus, and the span of a job's request, for traces."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.create_table(
        "worker_figures",
        sa.Column(
            "worker_id",
            sa.Text(),
            sa.ForeignKey("workers.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("figures", sa.Text(), nullable=False),
    )
    op.add_column("jobs", sa.Column("traceparent", sa.Text()))


def downgrade() -> None:
    op.drop_column("jobs", "traceparent")
    op.drop_table("worker_figures")
