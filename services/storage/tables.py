"""The tables of the storage service."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from mesh import idempotency, inbox, lock
from mesh.database import Timestamp, clock

metadata = MetaData()

file = Table(
    "file",
    metadata,
    Column("file_id", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False, index=True),
    Column("task_id", Text),  # null for an upload
    Column("attempt", Integer),
    Column("result_index", Integer, nullable=False, server_default="0"),
    Column("work", Text, index=True),  # its key; equal for results of equal work
    Column("origin", JSON(none_as_null=True)),
    Column("create_time", Timestamp, nullable=False, default=clock()),
    Column("ready", Boolean, nullable=False),
    Column("confirmed", Boolean, nullable=False),
    CheckConstraint("size_bytes > 0", name="file_not_empty"),
    # One result an attempt and index: the fence of a repeated write. Nulls do not collide.
    UniqueConstraint("task_id", "attempt", "result_index", name="file_of_attempt"),
    Index("file_of_user", "user_id", "file_id"),
    Index("file_unsettled", "ready", "confirmed", "create_time"),
)

# Which attempt makes the results of some work; the others wait for them. After `until` it is the next one's turn.
making = Table(
    "making",
    metadata,
    Column("work", Text, primary_key=True),
    Column("task_id", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("until", Timestamp, nullable=False),
    Index("making_of_attempt", "task_id", "attempt"),
)

# Quota that must still be given back, by the file it was reserved for: written with the row's removal, so that
# neither a crash nor an outage of the user service can lose it.
debt = Table(
    "debt",
    metadata,
    Column("file_id", Text, primary_key=True),
    Column("user_id", Text),  # null when an earlier release noted it
    Column("create_time", Timestamp, nullable=False, default=clock()),
)

idempotency_table = idempotency.table(metadata)
inbox_table = inbox.table(metadata)
lock_table = lock.table(metadata)
