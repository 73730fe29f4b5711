"""What results are of, and who makes what others wait for."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("file", sa.Column("work", sa.Text(), nullable=True))
    op.add_column("file", sa.Column("origin", sa.JSON(), nullable=True))
    op.create_index("ix_file_work", "file", ["work"])
    op.create_table(
        "making",
        sa.Column("work", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("work"),
    )
    op.create_index("making_of_attempt", "making", ["task_id", "attempt"])
