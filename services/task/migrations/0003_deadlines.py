"""Deadlines."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("task", schema=None) as batch_op:
        batch_op.add_column(sa.Column("deadline_microseconds", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("deadline_time", sa.BigInteger(), nullable=True))
        batch_op.create_index(
            "task_deadlines",
            ["deadline_time"],
            unique=False,
            sqlite_where=sa.text("state IN ('QUEUED', 'RUNNING') AND deadline_time IS NOT NULL"),
            postgresql_where=sa.text("state IN ('QUEUED', 'RUNNING') AND deadline_time IS NOT NULL"),
        )
