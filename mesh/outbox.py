"""Messages that leave with a transaction: rows of the caller's commit, published afterwards by a relay.

Delivery is at least once: a crash between the broker's confirm and the row's deletion publishes it again.

The order of a subject is the order in which its rows went in, if transactions that add to one subject exclude each
other: by a lock on what the subject is, held before `add`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Protocol

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    Update,
    delete,
    exists,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import crash, ids
from mesh.database import Database, Timestamp, advisory_lock, clock, when_ended
from mesh.errors import Unavailable

log = logging.getLogger(__name__)

BATCH = 500
TOGETHER = 100  # messages that leave as one
HELD = 2000  # messages in memory: two of the largest batches
LEASE = timedelta(seconds=5)  # how long the messages of a killed replica wait for another; many times a batch's time
REST_SECONDS_EACH, MAX_REST_SECONDS = 0.04, 0.25  # after a message was sent, of a round of them: the next gather
POLL_SECONDS = 1.0  # finds what a killed replica left behind; everything else leaves at once
SOON_SECONDS = 0.3  # another replica has sent what it holds, and deleted its row
TIDY_SECONDS = 0.25  # rows of what was sent in this time are deleted together; after a crash they are sent again
MAX_BACKOFF_SECONDS = 2.0  # as long as what waits may wait on once the broker is back


class MessageUnroutable(Unavailable):
    """The broker is there, and no queue wants the message yet."""

    reason = "MESSAGE_UNROUTABLE"


@dataclass(frozen=True, slots=True)
class Message:
    """What goes to the broker. Messages of one `subject` arrive in the order they were added.

    One without a subject is a hint to whoever is there: where no queue takes it, it is dropped.
    """

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
        Column("holder", String),
        Column("claimed_until", Timestamp),
        # Never hand out a deleted row's position again: it is the order.
        sqlite_autoincrement=True,
    )


class Publisher(Protocol):
    """Where messages go."""

    async def publish(self, *messages: Message) -> None:
        """Return once the broker has messages that go the same way safely.

        Raises:
            MessageUnroutable: no queue takes it.
            Unavailable: the broker is away, or did not confirm in time.
        """


@dataclass(slots=True)
class _Held:
    """A message that nobody else sends until `until`, of the event loop's clock."""

    message: Message
    holder: str
    until: float
    committed: bool


class Outbox:
    """A service's outbox in one of its replicas, all of which share the rows by leases in the database.

    What a replica adds it holds from the beginning: it is sent from memory as soon as it is committed, and the row is
    only there for whoever comes after a crash. Rows that nobody holds are claimed from the database: those that were
    too many, whose earlier messages another replica has not sent yet, or whose holder was lost.

    Args:
        database: where its rows are.
        table: made by `table`.
        lease: how long a row is its holder's.
    """

    def __init__(self, database: Database, table: Table, *, lease: timedelta = LEASE) -> None:
        self._database = database
        self._table = table
        self._lease = lease
        self._hold = (  # made once: making it costs as much as sending it
            insert(table)
            .values(claimed_until=clock(lease))
            .returning(table.c.position, table.c.message_id, _has_earlier_of_others(table).label("has_earlier"))
        )
        self._relaying = False
        self._holder = ids.new("obx")  # another one whenever what it holds can no longer be sent in order
        self._held: dict[int, _Held] = {}
        self._sent: set[int] = set()  # whose rows are still there
        self._tidy_time = math.inf
        self._look_time = 0.0
        self._woken = asyncio.Event()

    async def add(self, connection: AsyncConnection, *messages: Message) -> None:
        """Put messages, each with an id of its own, into the outbox of this transaction; they leave once it commits."""
        if not messages:
            return
        rows = [
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
        ]
        if not self._relaying or len(self._held) + len(messages) > HELD:
            await connection.execute(insert(self._table), rows)
            when_ended(connection, lambda _: self._look_within(0))
            return
        holder, until = self._holder, self._end_of_lease()
        added = (await connection.execute(self._hold, [{**row, "holder": holder} for row in rows])).all()
        by_id = {message.message_id: message for message in messages}
        held = [row.position for row in added if not row.has_earlier]
        behind = [row.position for row in added if row.has_earlier]
        for row in added:
            if not row.has_earlier:
                self._held[row.position] = _Held(by_id[row.message_id], holder, until, committed=False)
        when_ended(connection, partial(self._ended, held))
        if behind:
            await connection.execute(self._released(behind))
            when_ended(connection, lambda _: self._look_within(SOON_SECONDS))

    async def relay(self, publisher: Publisher) -> None:
        """Publish for ever: a background of `mesh.service.serve`."""
        failures, self._relaying = 0, True
        try:
            while True:
                self._woken.clear()  # before looking, so that a commit during the look is not slept over
                try:
                    found = await self._relay_some(publisher)
                except Unavailable as failure:
                    failures += 1
                    delay = min(0.1 * 2**failures, MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1)  # noqa: S311 - jitter, no secret
                    cause = repr(failure.__cause__ or failure)
                    log.warning("outbox waits", extra={"failure": cause, "delay_seconds": delay})
                    await asyncio.sleep(delay)
                    continue
                failures = 0
                if 0 < found < TOGETHER:
                    await asyncio.sleep(min(REST_SECONDS_EACH * found, MAX_REST_SECONDS))
                elif not found:
                    with suppress(TimeoutError):
                        async with asyncio.timeout_at(min(self._look_time, self._tidy_time)):
                            await self._woken.wait()
        finally:  # what went out is not sent again, the rest need not wait for its lease
            self._relaying = False
            self._let_go()
            await self._settle()

    async def _relay_some(self, publisher: Publisher) -> int:
        """Publish what can go; return how much that was."""
        time = asyncio.get_running_loop().time()
        if self._stale():  # first: a round that only gave back would look like one in which the broker was there
            await self._settle()
        if time >= self._look_time:
            full = await self._claim()
            self._look_time = time if full else time + POLL_SECONDS
        due = self._due(time)
        if due:
            crash.point("publish: messages taken")
            try:
                async with asyncio.timeout_at(min(self._held[position].until for position in due)):
                    await self._publish(publisher, due)
            except TimeoutError:
                self._let_go()
                raise Unavailable("The broker confirms too slowly.") from None
            except BaseException:
                self._let_go()
                raise
        if time >= self._tidy_time or len(self._sent) >= BATCH or self._stale():
            await self._settle()
        return len(due)

    async def _publish(self, publisher: Publisher, due: Mapping[int, Message]) -> None:
        unroutable: set[int] = set()

        async def publish(group: Sequence[int]) -> None:
            try:
                await publisher.publish(*(due[position] for position in group))
            except MessageUnroutable as failure:
                lasting = [position for position in group if due[position].subject]
                if lasting:
                    log.warning("message has no taker yet", extra={"failure": failure.message})
                    unroutable.update(lasting)
                group = [position for position in group if position not in lasting]
            crash.point("publish: confirmed")
            for position in group:
                del self._held[position]
            self._sent.update(group)
            self._tidy_time = min(self._tidy_time, asyncio.get_running_loop().time() + TIDY_SECONDS)

        try:
            for wave in _waves(due):
                stopped = {due[each].subject for each in unroutable}
                late = {each for each in wave if due[each].subject in stopped}
                unroutable.update(late)
                groups = _groups({each: due[each] for each in wave if each not in late})
                outcomes = await asyncio.gather(*map(publish, groups), return_exceptions=True)
                for outcome in outcomes:
                    if outcome is not None:
                        raise outcome
        finally:
            if unroutable:  # they are tried again when their lease lapses, hold nobody up meanwhile, and none overtakes
                for position in unroutable:
                    del self._held[position]
                self._let_go()
                ownerless = update(self._table).where(self._table.c.position.in_(unroutable)).values(holder=None)
                async with self._database.statement() as connection:
                    await connection.execute(ownerless)

    async def _claim(self) -> bool:
        """Hold rows that nobody holds; return whether there may be more."""
        rows, earlier = self._table, self._table.alias("earlier")
        holder, until = self._holder, self._end_of_lease()
        async with self._database.transaction() as connection:
            # One claims at a time. Locking rows (SKIP LOCKED) would not do: what another is about to claim would not be
            # seen as being sent, and a later row of its subject would overtake it.
            await advisory_lock(connection, self._table.name)
            being_sent = exists().where(
                earlier.c.subject == rows.c.subject,
                earlier.c.position < rows.c.position,
                earlier.c.claimed_until > clock(),
            )
            free = select(rows).where(
                or_(rows.c.claimed_until.is_(None), rows.c.claimed_until <= clock()),
                or_(rows.c.subject == "", ~being_sent),
                rows.c.position.not_in(self._sent),
            )
            found = (await connection.execute(free.order_by(rows.c.position).limit(BATCH))).all()
            if found:
                claimed = rows.c.position.in_([row.position for row in found])
                await connection.execute(
                    update(rows).where(claimed).values(claimed_until=clock(self._lease), holder=holder)
                )
        for row in found:
            message = Message(
                exchange=row.exchange,
                routing_key=row.routing_key,
                body=row.body,
                message_id=row.message_id,
                headers=json.loads(row.headers),
                content_type=row.content_type,
                subject=row.subject,
            )
            self._held[row.position] = _Held(message, holder, until, committed=True)
        return len(found) == BATCH

    def _due(self, time: float) -> dict[int, Message]:
        """Return what may go now. Of a subject none goes while an earlier one's transaction is under way."""
        if any(held.until <= time for held in self._held.values()):
            self._let_go()
        due, waiting = {}, set()
        for position in sorted(self._held):
            held = self._held[position]
            if not held.committed:
                waiting.add(held.message.subject)
            elif held.holder == self._holder and (not held.message.subject or held.message.subject not in waiting):
                due[position] = held.message
                if len(due) == BATCH:
                    break
        return due

    def _ended(self, positions: Sequence[int], committed: bool) -> None:
        for position in positions:
            if committed:
                self._held[position].committed = True
            else:
                del self._held[position]
        if not committed:  # what looks undone may be there nevertheless, and what follows must not overtake it
            self._let_go()
        self._woken.set()

    def _let_go(self) -> None:
        """Send nothing more of what is held now: the rows go back to all, and are claimed in order."""
        self._holder = ids.new("obx")
        self._look_within(0)

    def _stale(self) -> list[int]:
        return [each for each, held in self._held.items() if held.committed and held.holder != self._holder]

    async def _settle(self) -> None:
        """Delete the rows of what was sent; give back those that this replica no longer sends."""
        rows, sent, stale = self._table, frozenset(self._sent), self._stale()
        if sent:
            async with self._database.statement() as connection:
                await connection.execute(delete(rows).where(rows.c.position.in_(sent)))
                crash.point("publish: rows deleted")
            self._sent -= sent
            self._tidy_time = math.inf
            crash.point("publish: done")
        if stale:
            holders = {self._held[each].holder for each in stale}
            async with self._database.statement() as connection:  # unless somebody else has them by now
                await connection.execute(self._released(stale).where(rows.c.holder.in_(holders)))
            for each in stale:
                del self._held[each]
            self._look_within(0)

    def _released(self, positions: Collection[int]) -> Update:
        return update(self._table).where(self._table.c.position.in_(positions)).values(claimed_until=None, holder=None)

    def _look_within(self, seconds: float) -> None:
        self._look_time = min(self._look_time, asyncio.get_running_loop().time() + seconds)
        self._woken.set()

    def _end_of_lease(self) -> float:
        """Return the time by which all is sent that is held from now, with some to spare."""
        return asyncio.get_running_loop().time() + self._lease.total_seconds() * 0.8


def _has_earlier_of_others(table: Table) -> ColumnElement[bool]:
    """Return, of a row that is inserted, whether there is one of its subject that somebody else holds, or nobody."""
    earlier, row = table.alias("earlier"), table.name  # written out: SQLite's RETURNING knows no qualified columns
    return exists().where(
        literal_column(f"{row}.subject") != literal_column("''"),
        earlier.c.subject == literal_column(f"{row}.subject"),
        earlier.c.holder.is_distinct_from(literal_column(f"{row}.holder")),
    )


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
