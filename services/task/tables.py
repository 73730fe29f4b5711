"""The task service's tables."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text, text

from mesh import idempotency, lock, outbox
from mesh.database import Timestamp

metadata = MetaData()

# Written out, not bound: SQLite uses a partial index only for a query that states its very condition.
QUEUED = text("task.state = 'QUEUED'")
RUNNING = text("task.state = 'RUNNING'")
UNENDED = text("task.state IN ('QUEUED', 'RUNNING')")
PENDING = text("webhook_delivery.state = 'PENDING'")

task = Table(
    "task",
    metadata,
    Column("task_id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("role", String, nullable=False, server_default="ROLE_USER"),
    Column("pool", String, nullable=False),
    Column("turn", BigInteger, nullable=False, server_default="0"),
    Column("input_file_id", String, nullable=False),
    Column("file_ids", JSON, nullable=False),
    Column("operation", LargeBinary, nullable=False),
    Column("state", String, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("progress_fraction", Float, nullable=False),
    Column("progress_stage", String, nullable=False),
    Column("output_file_ids", JSON, nullable=False),
    Column("failure_code", Integer),
    Column("failure_message", String),
    Column("failure_reason", String),
    Column("create_time", Timestamp, nullable=False),
    Column("start_time", Timestamp),
    Column("end_time", Timestamp),
    Column("update_time", Timestamp, nullable=False),
    Column("due_time", Timestamp, nullable=False),
    Column("lease_time", Timestamp),
    Column("deadline_microseconds", BigInteger),
    Column("deadline_time", Timestamp),
    Column("batch_id", String),
    Column("request_id", String, nullable=False, server_default=""),
    Column("trace_id", String, nullable=False, server_default=""),
    Column("dead_time", Timestamp),
    Column("webhook_url", String),
    Index("task_by_user", "user_id", "create_time", "task_id"),
    Index("task_by_user_and_state", "user_id", "state", "create_time", "task_id"),
)
# Partial: only what waits or runs is ever looked for by time, and that stays small while ended tasks pile up.
Index(
    "task_turns",
    task.c.pool,
    task.c.turn,
    task.c.task_id,
    task.c.due_time,  # so that those that rest are passed over in the index itself
    sqlite_where=text("state = 'QUEUED'"),
    postgresql_where=text("state = 'QUEUED'"),
)
Index(
    "task_turns_of_user",
    task.c.pool,
    task.c.user_id,
    task.c.turn,
    sqlite_where=text("state IN ('QUEUED', 'RUNNING')"),
    postgresql_where=text("state IN ('QUEUED', 'RUNNING')"),
)
Index(
    "task_leases",
    task.c.lease_time,
    sqlite_where=text("state = 'RUNNING'"),
    postgresql_where=text("state = 'RUNNING'"),
)
Index(
    "task_deadlines",
    task.c.deadline_time,
    sqlite_where=text("state IN ('QUEUED', 'RUNNING') AND deadline_time IS NOT NULL"),
    postgresql_where=text("state IN ('QUEUED', 'RUNNING') AND deadline_time IS NOT NULL"),
)

Index(
    "task_by_batch",
    task.c.batch_id,
    task.c.create_time,
    task.c.task_id,
    sqlite_where=text("batch_id IS NOT NULL"),
    postgresql_where=text("batch_id IS NOT NULL"),
)

Index(
    "task_ended",
    task.c.end_time,
    sqlite_where=text("end_time IS NOT NULL"),
    postgresql_where=text("end_time IS NOT NULL"),
)
Index(
    "task_dead_letters",
    task.c.dead_time,
    task.c.task_id,
    sqlite_where=text("dead_time IS NOT NULL"),
    postgresql_where=text("dead_time IS NOT NULL"),
)

task_batch = Table(
    "task_batch",
    metadata,
    Column("batch_id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("create_time", Timestamp, nullable=False),
)

# One row for each user who ever queued something: locked while a turn is given, so that no two get the same.
taking_turns = Table(
    "taking_turns",
    metadata,
    Column("pool", String, primary_key=True),
    Column("user_id", String, primary_key=True),
)

task_event = Table(
    "task_event",
    metadata,
    Column("task_id", String, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("state", String, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("reason", String, nullable=False),
    Column("failure_code", Integer),
    Column("failure_message", String),
    Column("failure_reason", String),
    Column("create_time", Timestamp, nullable=False),
    # The task's columns that it changed, by name; none in events from before there were facts.
    Column("facts", JSON),
)

webhook = Table(
    "webhook",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("url", String),
    Column("secret", String, nullable=False),
    Column("previous_secret", String),
    Column("rotate_time", Timestamp),
    Column("create_time", Timestamp, nullable=False),
    Column("update_time", Timestamp, nullable=False),
)

webhook_delivery = Table(
    "webhook_delivery",
    metadata,
    Column("delivery_id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("task_id", String, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("url", String),
    Column("body", Text, nullable=False),
    Column("state", String, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("status", Integer),
    Column("failure", String),
    Column("create_time", Timestamp, nullable=False),
    Column("attempt_time", Timestamp),
    Column("due_time", Timestamp, nullable=False),
    Column("expire_time", Timestamp, nullable=False),
    Index("webhook_delivery_by_user", "user_id", "delivery_id"),
    Index("webhook_delivery_by_task", "task_id"),
)
Index(
    "webhook_delivery_due",
    webhook_delivery.c.due_time,
    sqlite_where=text("state = 'PENDING'"),
    postgresql_where=text("state = 'PENDING'"),
)

outbox_table = outbox.table(metadata)
idempotency_table = idempotency.table(metadata)
lock_table = lock.table(metadata)
