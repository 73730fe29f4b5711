"""Creates that may be repeated: the first call with a key decides the id, every later one gets the same.

The row goes in with the caller's transaction, so of many concurrent calls one wins and the others adopt its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from sqlalchemy import Column, LargeBinary, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh.database import Timestamp, clock, delete_some, insert_absent, insert_if_absent
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
        Column("create_time", Timestamp, nullable=False, index=True, default=clock()),
    )


@dataclass(frozen=True, slots=True)
class Request:
    """A create that may have been asked for before."""

    caller: str
    """Whose key it is, usually a user's id: two people may pick the same key."""
    method: str
    """The rpc's name."""
    key: str
    """The caller's request id, not empty."""
    fingerprint: bytes
    """A digest of everything in the request that matters, without the key."""
    new_id: str
    """The id to use if nobody was first."""


Adopted = tuple[str, bool]
"""The id that a key stands for, and whether its request was the first."""


async def adopt(
    connection: AsyncConnection,
    table: Table,
    *,
    caller: str,
    method: str,
    key: str,
    fingerprint: bytes,
    new_id: str,
) -> Adopted:
    """Return what the key of a request, which is a `Request`'s fields, stands for.

    `connection` is the transaction that stores the resource too.

    Raises:
        IdempotencyKeyReused: the key was used for a request with another fingerprint.
    """
    row = {
        "caller": caller,
        "method": method,
        "key": key,
        "fingerprint": fingerprint,
        "resource_id": new_id,
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


async def adopt_together(
    connection: AsyncConnection, table: Table, requests: Sequence[Request]
) -> list[Adopted | Exception]:
    """Return what `adopt` says of each of many requests, or raises."""
    first = {(each.caller, each.method, each.key): each for each in reversed(requests)}
    # In one order, so that two who do this wait for each other and do not meet crosswise.
    rows = [
        {
            "caller": each.caller,
            "method": each.method,
            "key": each.key,
            "fingerprint": each.fingerprint,
            "resource_id": each.new_id,
        }
        for _, each in sorted(first.items())
    ]
    fresh = await insert_absent(connection, table, rows, table.c.resource_id)
    answers: dict[str, Adopted | Exception] = {}
    for each in sorted(requests, key=lambda each: (each.caller, each.method, each.key)):  # `adopt` locks, too
        if each.new_id in fresh:
            answers[each.new_id] = each.new_id, True
            continue
        try:
            answers[each.new_id] = await adopt(connection, table, **asdict(each))
        except IdempotencyKeyReused as refusal:
            answers[each.new_id] = refusal
    return [answers[each.new_id] for each in requests]


async def forget(connection: AsyncConnection, table: Table, older_than: timedelta = timedelta(hours=24)) -> bool:
    """Delete some of the keys that are older than anybody retries; return whether more may be left."""
    old = table.c.create_time < clock(-older_than)
    return await delete_some(connection, table, old, at_most=FORGOTTEN_AT_ONCE)
