"""Retention."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    with op.batch_alter_table("task", schema=None) as batch_op:
        batch_op.create_index(
            "task_ended",
            ["end_time"],
            unique=False,
            sqlite_where=sa.text("end_time IS NOT NULL"),
            postgresql_where=sa.text("end_time IS NOT NULL"),
        )
