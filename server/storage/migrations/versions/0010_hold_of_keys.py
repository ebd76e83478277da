"""How long the calls of a key are held before "processing"."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("hold_s", sa.Float()))


def downgrade() -> None:
    op.drop_column("api_keys", "hold_s")
