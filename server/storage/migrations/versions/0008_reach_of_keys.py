"""What each key may reach, by name and for webhooks too."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

COLUMNS = ("fetch_hosts", "webhook_networks", "webhook_hosts")


def upgrade() -> None:
    for name in COLUMNS:
        op.add_column("api_keys", sa.Column(name, sa.JSON(), nullable=True))


def downgrade() -> None:
    for name in COLUMNS:
        op.drop_column("api_keys", name)
