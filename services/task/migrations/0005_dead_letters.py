"""Dead letters."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    with op.batch_alter_table("task", schema=None) as batch_op:
        batch_op.add_column(sa.Column("request_id", sa.String(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("trace_id", sa.String(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("dead_time", sa.BigInteger(), nullable=True))
        batch_op.create_index(
            "task_dead_letters",
            ["dead_time", "task_id"],
            unique=False,
            sqlite_where=sa.text("dead_time IS NOT NULL"),
            postgresql_where=sa.text("dead_time IS NOT NULL"),
        )
