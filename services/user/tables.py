"""The tables of the user service."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Index, Integer, MetaData, Table, Text

from mesh import idempotency, inbox, lock
from mesh.database import Timestamp

metadata = MetaData()

account = Table(
    "account",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("username", Text, nullable=False),
    Column("username_key", Text, nullable=False, unique=True),  # without case
    Column("email", Text, nullable=False),
    Column("email_key", Text, nullable=False, unique=True),  # without case
    Column("display_name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("password_hash", Text, nullable=False),
    Column("limit_tasks", BigInteger),  # the role's when null
    Column("limit_storage_bytes", BigInteger),
    Column("create_time", Timestamp, nullable=False),
    Column("version", Integer, nullable=False),
    Column("generation", Integer, nullable=False, server_default="1"),
)

ended_generation = Table(
    "ended_generation",
    metadata,
    Column("generation_id", Text, primary_key=True),  # until the auth service has been told
)

counter = Table(
    "counter",
    metadata,
    Column("user_id", Text, ForeignKey("account.user_id"), primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("period", Text, primary_key=True),  # `2026-10`, or empty
    Column("used", BigInteger, nullable=False),
    Column("reserved", BigInteger, nullable=False),
    CheckConstraint("used >= 0 AND reserved >= 0", name="counter_not_negative"),
)

reservation = Table(
    "reservation",
    metadata,
    Column("reservation_id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("account.user_id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("period", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("update_time", Timestamp, nullable=False),
    Index("reservation_by_state", "state", "update_time"),
)

ledger = Table(
    "ledger",
    metadata,
    # SQLite numbers rows by itself only where the key is exactly INTEGER.
    Column("entry_id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("period", Text, nullable=False),
    Column("reservation_id", Text, nullable=False),
    Column("used", BigInteger, nullable=False),  # what the change added
    Column("reserved", BigInteger, nullable=False),
    Column("create_time", Timestamp, nullable=False),
)

inbox_table = inbox.table(metadata)
idempotency_table = idempotency.table(metadata)
lock_table = lock.table(metadata)
