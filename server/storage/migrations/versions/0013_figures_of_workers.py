"""What each worker has counted, for the metrics that API processes give to Prometheus."""

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


def downgrade() -> None:
    op.drop_table("worker_figures")
