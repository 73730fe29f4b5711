"""Which events a consumer has already taken, so that one delivered twice takes effect once."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from sqlalchemy import Column, MetaData, String, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh.database import Timestamp, clock, delete_some, insert_absent

FORGOTTEN_AT_ONCE = 1000  # rows in one transaction, so that nobody who writes waits long for it


def table(metadata: MetaData) -> Table:
    """Return the table, made in a service's own metadata."""
    return Table(
        "inbox",
        metadata,
        Column("consumer", String, primary_key=True),
        Column("event_id", String, primary_key=True),
        Column("receive_time", Timestamp, nullable=False, index=True, default=clock()),
    )


async def first_time(connection: AsyncConnection, table: Table, consumer: str, event_ids: Iterable[str]) -> set[str]:
    """Note that `consumer` takes events in this transaction; return those that it has not taken before."""
    # In one order, so that two who take the same ones wait for each other and do not meet crosswise.
    rows = [{"consumer": consumer, "event_id": each} for each in sorted(set(event_ids))]
    return await insert_absent(connection, table, rows, table.c.event_id)


async def forget(connection: AsyncConnection, table: Table, older_than: timedelta) -> bool:
    """Delete some of what was taken longer ago than a redelivery can come; return whether more may be left."""
    old = table.c.receive_time < clock(-older_than)
    return await delete_some(connection, table, old, at_most=FORGOTTEN_AT_ONCE)
