"""Messages that leave with a transaction: rows of the caller's commit, published afterwards by a relay.

Delivery is at least once: a crash between the broker's confirm and the row's deletion publishes it again.

The order of a subject is the order in which its rows went in, if transactions that add to one subject exclude each
other: by a lock on what the subject is, held before `add`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from sqlalchemy import (
    BigInteger,
    Column,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    exists,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import crash
from mesh.database import Database, Timestamp, advisory_lock, now
from mesh.errors import Unavailable

log = logging.getLogger(__name__)

BATCH = 500
TOGETHER = 100  # messages that leave as one
LEASE = timedelta(seconds=10)  # how long the messages of a killed replica wait for another; many times a batch's time
POLL_SECONDS = 1.0  # finds what a killed replica left behind; `wake` makes everything else leave at once
MAX_BACKOFF_SECONDS = 5.0


class MessageUnroutable(Unavailable):
    """The broker is there, and no queue wants the message yet."""

    reason = "MESSAGE_UNROUTABLE"


@dataclass(frozen=True, slots=True)
class Message:
    """What goes to the broker. Messages of one `subject`, if it has one, arrive in the order they were added."""

    exchange: str
    routing_key: str
    body: bytes
    message_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/protobuf"
    subject: str = ""


def table(metadata: MetaData) -> Table:
    """Return the table, made in a service's own metadata."""
    return Table(
        "outbox",
        metadata,
        # SQLite counts up by itself only in a column of exactly its INTEGER type.
        Column("position", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        Column("exchange", String, nullable=False),
        Column("routing_key", String, nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("message_id", String, nullable=False),
        Column("headers", Text, nullable=False),
        Column("content_type", String, nullable=False),
        Column("subject", String, nullable=False, index=True),
        Column("claimed_until", Timestamp),
        # Never hand out a deleted row's position again: it is the order.
        sqlite_autoincrement=True,
    )


async def add(connection: AsyncConnection, table: Table, *messages: Message) -> None:
    """Put messages into the outbox of this transaction; wake the relay once it has committed."""
    if not messages:
        return
    await connection.execute(
        insert(table),
        [
            {
                "exchange": message.exchange,
                "routing_key": message.routing_key,
                "body": message.body,
                "message_id": message.message_id,
                "headers": json.dumps(dict(message.headers)),
                "content_type": message.content_type,
                "subject": message.subject,
            }
            for message in messages
        ],
    )


class Publisher(Protocol):
    """Where messages go."""

    async def publish(self, *messages: Message) -> None:
        """Return once the broker has messages that go the same way safely.

        Raises:
            MessageUnroutable: no queue takes it.
            Unavailable: the broker is away, or did not confirm in time.
        """


class Relay:
    """Carries the outbox to the broker. Every replica runs one; they share the rows by leases in the database."""

    def __init__(self, database: Database, table: Table, publisher: Publisher, *, lease: timedelta = LEASE) -> None:
        self._database = database
        self._table = table
        self._publisher = publisher
        self._lease = lease
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Say that a transaction with messages has committed."""
        self._woken.set()

    async def run(self) -> None:
        """Publish for ever: a background of `mesh.service.serve`."""
        failures = 0
        while True:
            self._woken.clear()  # before looking, so that a commit during the look is not slept over
            try:
                found = await self._relay_batch()
            except Unavailable as failure:
                failures += 1
                delay = min(0.1 * 2**failures, MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1)  # noqa: S311 - jitter, no secret
                cause = repr(failure.__cause__ or failure)
                log.warning("outbox waits", extra={"failure": cause, "delay_seconds": delay})
                await asyncio.sleep(delay)
                continue
            failures = 0
            if not found:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._woken.wait()

    async def _relay_batch(self) -> bool:
        """Publish what can be claimed; return whether there was anything."""
        claimed, lease_end = await self._claim()
        if not claimed:
            return False
        crash.point("publish: messages taken")

        confirmed: set[int] = set()
        unroutable: set[int] = set()

        async def publish(group: Sequence[int]) -> None:
            try:
                await self._publisher.publish(*(claimed[position] for position in group))
            except MessageUnroutable as failure:
                log.warning("message has no taker yet", extra={"failure": failure.message})
                unroutable.update(group)
                return
            crash.point("publish: confirmed")
            confirmed.update(group)

        async def publish_all() -> None:
            for wave in _waves(claimed):
                stopped = {claimed[each].subject for each in unroutable} - {""}
                late = {each for each in wave if claimed[each].subject in stopped}
                unroutable.update(late)
                groups = _groups({each: claimed[each] for each in wave if each not in late})
                outcomes = await asyncio.gather(*map(publish, groups), return_exceptions=True)
                for outcome in outcomes:
                    if outcome is not None:
                        raise outcome

        try:
            async with asyncio.timeout(
                self._lease.total_seconds() * 0.8
            ):  # none goes out after another may have claimed it
                await publish_all()
        except TimeoutError:
            raise Unavailable("The broker confirms too slowly.") from None
        finally:  # also when stopped: what went out is not sent again, the rest need not wait for its lease
            # The unroutable stay claimed: they are tried again when the lease lapses and hold nobody up meanwhile.
            await self._settle(confirmed, claimed.keys() - confirmed - unroutable, lease_end)
        return True

    async def _claim(self) -> tuple[Mapping[int, Message], datetime]:
        rows, earlier = self._table, self._table.alias("earlier")
        async with self._database.transaction() as connection:
            # One claims at a time. Locking rows (SKIP LOCKED) would not do: what another is about to claim would not be
            # seen as being sent, and a later row of its subject would overtake it.
            await advisory_lock(connection, self._table.name)
            time = await now(connection)
            being_sent = exists().where(
                earlier.c.subject == rows.c.subject,
                earlier.c.position < rows.c.position,
                earlier.c.claimed_until > time,
            )
            free = select(rows).where(
                or_(rows.c.claimed_until.is_(None), rows.c.claimed_until <= time),
                or_(rows.c.subject == "", ~being_sent),
            )
            found = (await connection.execute(free.order_by(rows.c.position).limit(BATCH))).all()
            messages = {
                row.position: Message(
                    exchange=row.exchange,
                    routing_key=row.routing_key,
                    body=row.body,
                    message_id=row.message_id,
                    headers=json.loads(row.headers),
                    content_type=row.content_type,
                    subject=row.subject,
                )
                for row in found
            }
            if messages:
                await connection.execute(
                    update(rows).where(rows.c.position.in_(messages)).values(claimed_until=time + self._lease)
                )
        return messages, time + self._lease

    async def _settle(self, confirmed: Collection[int], unsent: Collection[int], lease_end: datetime) -> None:
        rows = self._table
        async with self._database.transaction() as connection:
            await connection.execute(delete(rows).where(rows.c.position.in_(confirmed)))
            crash.point("publish: rows deleted")
            if unsent:
                # The end of the lease tells this claim from a later one of the same row.
                mine = rows.c.position.in_(unsent) & (rows.c.claimed_until == lease_end)
                await connection.execute(update(rows).where(mine).values(claimed_until=None))
        crash.point("publish: done")


def _waves(messages: Mapping[int, Message]) -> list[list[int]]:
    """Return positions in waves, none with two messages of one subject: each wave follows the one before it."""
    earlier: Counter[str] = Counter()
    waves: list[list[int]] = []
    for position, message in messages.items():
        wave = earlier[message.subject] if message.subject else 0
        earlier[message.subject] += 1
        if wave == len(waves):
            waves.append([])
        waves[wave].append(position)
    return waves


def _groups(messages: Mapping[int, Message]) -> Iterator[list[int]]:
    """Yield positions that leave as one: events of one type. What goes to a queue itself leaves by itself."""
    routes: defaultdict[tuple[str, str, int], list[int]] = defaultdict(list)
    for position, message in messages.items():
        routes[message.exchange, message.routing_key, 0 if message.exchange else position].append(position)
    for route in routes.values():
        for start in range(0, len(route), TOGETHER):
            yield route[start : start + TOGETHER]
