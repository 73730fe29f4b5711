"""Several results of one attempt."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # The check is named since SQLite's copy of the table would lose it otherwise.
    not_empty = sa.CheckConstraint("size_bytes > 0", name="file_not_empty")
    with op.batch_alter_table("file", schema=None, table_args=(not_empty,)) as batch_op:
        batch_op.add_column(sa.Column("result_index", sa.Integer(), nullable=False, server_default="0"))
        batch_op.drop_constraint("file_of_attempt", type_="unique")
        batch_op.create_unique_constraint("file_of_attempt", ["task_id", "attempt", "result_index"])
