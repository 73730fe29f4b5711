"""Creates that may be repeated: the first call with a key decides the id, every later one gets the same.

The row goes in with the caller's transaction, so of many concurrent calls one wins and the others adopt its id.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Column, LargeBinary, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh.database import Timestamp, delete_some, insert_if_absent, now
from mesh.errors import FailedPrecondition

FORGOTTEN_AT_ONCE = 1000  # keys in one transaction, so that nobody who writes waits long for it


class IdempotencyKeyReused(FailedPrecondition):
    reason = "IDEMPOTENCY_KEY_REUSED"


def table(metadata: MetaData) -> Table:
    """Return the table, made in a service's own metadata."""
    return Table(
        "idempotency",
        metadata,
        Column("caller", String, primary_key=True),
        Column("method", String, primary_key=True),
        Column("key", String, primary_key=True),
        Column("fingerprint", LargeBinary, nullable=False),
        Column("resource_id", String, nullable=False),
        Column("create_time", Timestamp, nullable=False, index=True),
    )


async def adopt(
    connection: AsyncConnection,
    table: Table,
    *,
    caller: str,
    method: str,
    key: str,
    fingerprint: bytes,
    new_id: str,
) -> tuple[str, bool]:
    """Return the id that this key stands for, and whether this call was the first.

    Args:
        connection: the transaction that stores the resource too.
        table: from `table`.
        caller: whose key it is, usually a user's id: two people may pick the same key.
        method: the rpc's full name.
        key: the caller's request id, not empty.
        fingerprint: a digest of everything in the request that matters, without the key.
        new_id: the id to use if nobody was first.

    Raises:
        IdempotencyKeyReused: the key was used for a request with another fingerprint.
    """
    row = {
        "caller": caller,
        "method": method,
        "key": key,
        "fingerprint": fingerprint,
        "resource_id": new_id,
        "create_time": await now(connection),
    }
    mine = (table.c.caller == caller) & (table.c.method == method) & (table.c.key == key)
    # Locked, the key goes on standing for its resource while this transaction lasts.
    found = select(table.c.resource_id, table.c.fingerprint).where(mine).with_for_update()
    first = None
    while first is None:  # with several writers the row that was in the way may be gone by the time it is read
        if await insert_if_absent(connection, table, row):
            return new_id, True
        first = (await connection.execute(found)).one_or_none()
    if first.fingerprint != fingerprint:
        raise IdempotencyKeyReused(
            f"The request id {key} was used for another request. Use a new one for a new request.",
            metadata={"request_id": key},
        )
    return first.resource_id, False


async def forget(connection: AsyncConnection, table: Table, older_than: timedelta = timedelta(hours=24)) -> bool:
    """Delete some of the keys that are older than anybody retries; return whether more may be left."""
    old = table.c.create_time < await now(connection) - older_than
    return await delete_some(connection, table, old, at_most=FORGOTTEN_AT_ONCE)
