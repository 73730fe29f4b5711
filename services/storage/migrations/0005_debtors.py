"""Whose quota is to be given back."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("debt", sa.Column("user_id", sa.Text(), nullable=True))
