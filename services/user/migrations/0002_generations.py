"""Generations of accounts, and those that the auth service must be told have ended."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "ended_generation",
        sa.Column("generation_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("generation_id"),
    )
    with op.batch_alter_table("account", schema=None) as batch_op:
        batch_op.add_column(sa.Column("generation", sa.Integer(), server_default="1", nullable=False))
