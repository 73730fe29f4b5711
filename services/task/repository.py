"""Tasks in a SQL database. Knows no protobuf: what a change tells the world is encoded by a function."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    LargeBinary,
    Row,
    Select,
    String,
    TextClause,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    tuple_,
    union,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import crash, idempotency, ids, lock
from mesh.database import Database, Timestamp, clock, insert_absent, insert_if_absent, now
from mesh.outbox import Message, Outbox
from mesh.together import Together
from services.task.domain import (
    FORGET,
    Batch,
    Change,
    DeadQuery,
    Discrepancy,
    Event,
    EventPage,
    EventQuery,
    Failure,
    History,
    Notice,
    Page,
    Progress,
    Query,
    Replay,
    State,
    Step,
    Task,
    Version,
    require_batch,
    require_found,
    turns,
)
from services.task.tables import (
    QUEUED,
    RUNNING,
    UNENDED,
    idempotency_table,
    lock_table,
    taking_turns,
)
from services.task.tables import task as task_table
from services.task.tables import task_batch as batch_table
from services.task.tables import task_event as event_table
from services.task.tables import webhook as webhook_table
from services.task.tables import webhook_delivery as delivery_table
from services.task.webhooks import (
    PATIENCE,
    Delivery,
    DeliveryState,
)

TOGETHER = 100  # in one transaction
_MICROSECOND = timedelta(microseconds=1)
_NO_ORIGINS: Mapping[str, Context] = {}
# Change between events, too.
_UNTOLD = frozenset({"progress_fraction", "progress_stage", "lease_time", "update_time"})
# Made once, as all that is sent for each task: making a statement costs as much as sending it.
_UPDATE = update(task_table).where(task_table.c.task_id == bindparam("key"))
_INSERT_EVENT = insert(event_table)
# In one order, so that two who lock the same ones wait for each other and do not meet crosswise.
_LOCK = (
    select(task_table, clock().label("now"))
    .where(task_table.c.task_id.in_(bindparam("task_ids", expanding=True)))
    .order_by(task_table.c.task_id)
    .with_for_update()
)
_HEARING = select(webhook_table.c.user_id).where(
    webhook_table.c.user_id.in_(bindparam("user_ids", expanding=True)), webhook_table.c.url.is_not(None)
)
_LOCK_TURNS = (
    select(taking_turns)
    .where(taking_turns.c.pool == bindparam("pool"), taking_turns.c.user_id == bindparam("user_id"))
    .with_for_update()
)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A step with one task."""

    task_id: str
    step: Step
    origin: Context = field(default_factory=copy_context)
    """Of whose request it is, though it is done with others': its events name it."""


@dataclass(frozen=True, slots=True)
class _New:
    """A task to be stored, unless it is there already."""

    task_id: str
    created: Callable[[datetime], Change]
    origin: Context = field(default_factory=copy_context)


class SqlTasks:
    """Satisfies `domain.Tasks`. One transaction per method.

    Args:
        database: where they are.
        outbox: theirs.
        encode: makes the message of a notice; it leaves with the transaction.
        hook_body: says what a webhook is told of an ended task: the kind of event, and a body.
    """

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        encode: Callable[[Notice], Message],
        hook_body: Callable[[Task], tuple[str, str]],
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._encode = encode
        self._hook_body = hook_body
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self._adopted = Together[idempotency.Request, idempotency.Adopted](self._adopt_together, at_most=TOGETHER)
        self._added = Together[_New, Task](self._add_together, at_most=TOGETHER)
        self._changed = Together[_Wanted, Task](self._change_together, at_most=TOGETHER)

    def after_commit(self, *listeners: Callable[[str], None]) -> None:
        """Call each of `listeners` with a task's id after every change of it from now on."""
        self._listeners = listeners

    async def adopt(self, user_id: str, method: str, key: str, fingerprint: bytes, new_id: str) -> tuple[str, bool]:
        return await self._adopted(idempotency.Request(user_id, method, key, fingerprint, new_id))

    async def add(self, task_id: str, created: Callable[[datetime], Change]) -> Task:
        return await self._added(_New(task_id, created))

    async def add_batch(self, batch_id: str, created: Callable[[datetime], Sequence[Change]]) -> Batch:
        async with self._database.transaction() as connection:
            changes = created(await now(connection))
            task = changes[0].task
            batch_row = {
                "batch_id": batch_id,
                "user_id": task.user_id,
                "size": len(changes),
                "create_time": task.create_time,
            }
            if await insert_if_absent(connection, batch_table, batch_row):
                changes = await _all_in_turn(connection, changes)
                rows = [_columns(each.task) for each in changes]
                await connection.execute(insert(task_table), rows)
                await self._tell(connection, [*zip(changes, map(_first_facts, rows), strict=True)])
            crash.point("batch: written")
            batch = await _batch(connection, batch_id)
        crash.point("batch: committed")
        assert batch is not None  # noqa: S101 - of this transaction, or of one before
        for each in changes:
            self._committed(each.task.task_id)
        return batch

    async def change_batch(self, batch_id: str, step: Step, *, owner: str) -> Batch:
        async with self._database.transaction() as connection:
            require_batch(await _batch(connection, batch_id), batch_id, owner)
            members = (
                select(task_table)
                .where(task_table.c.batch_id == batch_id)
                .order_by(task_table.c.task_id)
                .with_for_update()
            )
            tasks = [_task(row) for row in await connection.execute(members)]
            await self._take(connection, tasks, step, await now(connection))
            crash.point("batch cancelled: written")
            batch = require_batch(await _batch(connection, batch_id), batch_id, owner)
        crash.point("batch cancelled: committed")
        for each in tasks:
            self._committed(each.task_id)
        return batch

    async def find_batch(self, batch_id: str) -> Batch | None:
        async with self._database.reading() as connection:
            return await _batch(connection, batch_id)

    async def change(self, task_id: str, step: Step, *, owner: str | None = None) -> Task:
        if owner is None:  # workers', and there are many of them at a time
            return await self._changed(_Wanted(task_id, step))
        async with self._database.transaction() as connection:
            task = require_found(await _locked(connection, task_id), task_id, owner)
            [change] = await self._take(connection, [task], step, await now(connection))
            crash.point(f"{change.task.state}: written")
        crash.point(f"{change.task.state}: committed")
        if change.task.version != task.version:
            self._committed(task_id)
        return change.task

    async def claim(self, pool: str, count: int, step: Step) -> Page:
        async with self._database.transaction() as connection:
            rows = await _next(connection, pool, count)
            if not rows:
                return Page([], more=False)
            changes = await self._take(connection, [_task(row) for row in rows], step, rows[0].now)
            crash.point("claim: written")
        crash.point("claim: committed")
        for change in changes:
            self._committed(change.task.task_id)
        return Page([change.task for change in changes], more=len(rows) == count < rows[0].waiting)

    async def find(self, task_id: str) -> Task | None:
        async with self._database.query() as connection:
            row = (await connection.execute(select(task_table).where(task_table.c.task_id == task_id))).one_or_none()
        return None if row is None else _task(row)

    async def page(self, query: Query) -> Page:
        async with self._database.query() as connection:
            tasks = [_task(row) for row in await connection.execute(listed(query))]
        return Page(tasks[: query.size], len(tasks) > query.size)

    async def dead(self, query: DeadQuery) -> Page:
        place = tuple_(task_table.c.dead_time, task_table.c.task_id)
        found = (
            select(task_table)
            .where(task_table.c.dead_time.is_not(None))
            .order_by(task_table.c.dead_time, task_table.c.task_id)
            .limit(query.size + 1)
        )
        if query.reason is not None:
            found = found.where(task_table.c.failure_reason == query.reason)
        if query.after is not None:
            found = found.where(place > tuple_(*query.after, types=[Timestamp(), String()]))
        async with self._database.query() as connection:
            tasks = [_task(row) for row in await connection.execute(found)]
        return Page(tasks[: query.size], len(tasks) > query.size)

    async def events(self, query: EventQuery) -> EventPage:
        found = (
            select(event_table)
            .where(event_table.c.task_id == query.task_id, event_table.c.sequence > query.after)
            .order_by(event_table.c.sequence)
            .limit(query.size + 1)
        )
        async with self._database.query() as connection:
            events = [_event(row) for row in await connection.execute(found)]
        return EventPage(events[: query.size], len(events) > query.size)

    async def histories(self, task_ids: Sequence[str]) -> list[History]:
        events: dict[str, list[Event]] = {}
        async with self._database.reading() as connection:
            tasks = [_task(row) for row in await connection.execute(_among(select(task_table), task_table, task_ids))]
            past = _among(select(event_table), event_table, task_ids).order_by(event_table.c.sequence)
            for row in await connection.execute(past):
                events.setdefault(row.task_id, []).append(_event(row))
        return [History(task, tuple(events.get(task.task_id, ()))) for task in tasks]

    async def replay(self, after: str, at_most: int, *, rebuild: bool) -> Replay:
        ids = union(*(select(each.c.task_id).where(each.c.task_id > after) for each in (event_table, task_table)))
        async with self._database.transaction() as connection:
            task_ids = list(await connection.scalars(ids.order_by("task_id").limit(at_most)))
            found = _among(select(task_table), task_table, task_ids).order_by(task_table.c.task_id).with_for_update()
            present = {row.task_id: row._asdict() for row in await connection.execute(found)}
            told = _among(select(event_table), event_table, task_ids).order_by(event_table.c.sequence)
            facts = defaultdict[str, list[Any]](list)
            for row in await connection.execute(told):
                facts[row.task_id].append(row.facts)
            complete = [each for each in task_ids if facts[each] and None not in facts[each]]
            discrepancies = []
            for task_id in complete:
                rebuilt = _told(facts[task_id])
                if (fields := _differing(rebuilt, present.get(task_id))) is None:
                    continue
                discrepancies.append(Discrepancy(task_id, fields))
                if rebuild:
                    if rebuilt["lease_time"] is not None:  # as long as it was given, from now: its worker may live
                        rebuilt["lease_time"] += await now(connection) - rebuilt["update_time"]
                    await connection.execute(delete(task_table).where(task_table.c.task_id == task_id))
                    await connection.execute(insert(task_table).values(rebuilt))
        if rebuild:
            for each in discrepancies:
                self._committed(each.task_id)
        last = task_ids[-1] if len(task_ids) == at_most else None
        return Replay(len(complete), len(task_ids) - len(complete), discrepancies, last)

    async def versions(self, task_ids: Sequence[str]) -> dict[str, Version]:
        columns = select(
            task_table.c.task_id,
            task_table.c.sequence,
            task_table.c.progress_fraction,
            task_table.c.progress_stage,
        )
        async with self._database.query() as connection:
            rows = await connection.execute(_among(columns, task_table, task_ids))
            return {row.task_id: (row.sequence, _progress(row)) for row in rows}

    async def lapsed(self, limit: int) -> list[str]:
        return await self._past(RUNNING, task_table.c.lease_time, limit)

    async def late(self, limit: int) -> list[str]:
        return await self._past(UNENDED, task_table.c.deadline_time, limit)

    async def overdue(self, pool: str, waited: timedelta) -> int:
        due = _due(pool, clock(-waited))
        async with self._database.query() as connection:
            return (await connection.execute(select(func.count()).where(*due))).scalar_one()

    async def forget(self, fence: int) -> None:
        more = True
        while more:
            async with self._database.transaction() as connection:
                await lock.require(connection, lock_table, FORGET, fence)
                more = await idempotency.forget(connection, idempotency_table)

    async def cut(self, kept: timedelta, at_most: int, fence: int) -> int:
        async with self._database.transaction() as connection:
            # One at a time: of two that each delete one of a batch's last tasks, neither would see the batch empty.
            await lock.require(connection, lock_table, FORGET, fence)
            old = (
                select(task_table.c.task_id, task_table.c.batch_id)
                .where(task_table.c.end_time < clock(-kept))
                .order_by(task_table.c.end_time)
                .limit(at_most)
                .with_for_update(skip_locked=True)
            )
            rows = (await connection.execute(old)).all()
            task_ids, batch_ids = [row.task_id for row in rows], {row.batch_id for row in rows if row.batch_id}
            if task_ids:
                await connection.execute(delete(delivery_table).where(delivery_table.c.task_id.in_(task_ids)))
                await connection.execute(delete(event_table).where(event_table.c.task_id.in_(task_ids)))
                await connection.execute(delete(task_table).where(task_table.c.task_id.in_(task_ids)))
            if batch_ids:
                members = exists().where(task_table.c.batch_id == batch_table.c.batch_id)
                await connection.execute(delete(batch_table).where(batch_table.c.batch_id.in_(batch_ids), ~members))
        return len(task_ids)

    async def _past(self, which: TextClause, time: Column[datetime], limit: int) -> list[str]:
        """Return tasks whose `time` is over, the longest over first."""
        found = select(task_table.c.task_id).where(which, time < clock()).order_by(time).limit(limit)
        async with self._database.query() as connection:
            return list((await connection.execute(found)).scalars())

    def _committed(self, task_id: str) -> None:
        for listener in self._listeners:
            listener(task_id)

    async def _take(
        self, connection: AsyncConnection, tasks: Sequence[Task], step: Step, time: datetime
    ) -> list[Change]:
        """Take a step with each of `tasks`, which are locked; return what became of them, in order."""
        changes = [step(task, time) for task in tasks]
        anew = [each for task, each in zip(tasks, changes, strict=True) if each.task.round != task.round]
        if anew:  # queued by their owner again: each waits for another turn
            placed = {each.task.task_id: each for each in await _in_turn(connection, anew)}
            changes = [placed.get(each.task.task_id, each) for each in changes]
        await self._store(connection, zip(tasks, changes, strict=True))
        return changes

    async def _store(
        self,
        connection: AsyncConnection,
        moved: Iterable[tuple[Task, Change]],
        origins: Mapping[str, Context] = _NO_ORIGINS,
    ) -> None:
        """Write what became of tasks: the columns that changed."""
        alike = defaultdict[tuple[str, ...], list[dict[str, Any]]](list)  # those that one statement writes
        told = []
        for task, change in moved:
            row = _columns(change.task)
            changed = _changed(_columns(task), row)
            if changed:
                alike[tuple(changed)].append({**changed, "key": task.task_id})
            if change.task.sequence != task.sequence:
                told.append((change, _facts(changed, row)))
        for rows in alike.values():
            await connection.execute(_UPDATE, rows)
        await self._tell(connection, told, origins)

    async def _adopt_together(self, requests: Sequence[idempotency.Request]) -> list[idempotency.Adopted | Exception]:
        async with self._database.statement() as connection:
            return await idempotency.adopt_together(connection, idempotency_table, requests)

    async def _add_together(self, wanted: Sequence[_New]) -> list[Task | Exception]:
        """Store each task that is wanted, whatever becomes of the others; return what is there then, or why not."""
        refusals: dict[int, Exception] = {}
        async with self._database.transaction() as connection:
            time = await now(connection)
            made: dict[str, Change] = {}
            for number, each in enumerate(wanted):
                if each.task_id not in made:
                    try:
                        made[each.task_id] = each.created(time)
                    except Exception as error:  # noqa: BLE001 - its caller's alone
                        refusals[number] = error
            changes = await _all_in_turn(connection, made.values())
            rows = {each.task.task_id: _columns(each.task) for each in changes}
            stored = await insert_absent(connection, task_table, [*rows.values()], task_table.c.task_id)
            crash.point("create: task written")
            new = [each for each in changes if each.task.task_id in stored]
            told = [(each, _first_facts(rows[each.task.task_id])) for each in new]
            await self._tell(connection, told, {each.task_id: each.origin for each in wanted})
            crash.point("create: events written")
            tasks = {each.task.task_id: each.task for each in new}
            # What another call with the same key has stored is ours.
            if others := {each.task_id for each in wanted} - stored:
                tasks |= (await _locked_together(connection, others))[0]
        crash.point("create: committed")
        for change in new:
            self._committed(change.task.task_id)
        return [tasks.get(each.task_id) or refusals[number] for number, each in enumerate(wanted)]

    async def _change_together(self, wanted: Sequence[_Wanted]) -> list[Task | Exception]:
        """Take each step that is wanted, whatever becomes of the others; return the tasks after it, or why not."""
        outcomes: list[Task | Exception] = []
        async with self._database.transaction() as connection:
            tasks, time = await _locked_together(connection, {each.task_id for each in wanted})
            first, news, origins = dict(tasks), dict[str, tuple[Task, Change]](), dict[str, Context]()
            for each in wanted:
                if each.task_id in news:  # a second step with one task: its event follows the first one's
                    await self._store(connection, news.values(), origins)
                    news.clear()
                try:
                    task = require_found(tasks.get(each.task_id), each.task_id)
                    change = each.step(task, time)
                except Exception as error:  # noqa: BLE001 - its caller's alone
                    outcomes.append(error)
                else:
                    news[each.task_id], origins[each.task_id] = (task, change), each.origin
                    tasks[each.task_id] = change.task
                    outcomes.append(change.task)
            if news:
                await self._store(connection, news.values(), origins)
            for state in {task.state for task in tasks.values()}:
                crash.point(f"{state}: written")
        for task in tasks.values():
            crash.point(f"{task.state}: committed")
            if task.version != first[task.task_id].version:
                self._committed(task.task_id)
        return outcomes

    async def _tell(
        self,
        connection: AsyncConnection,
        told: Sequence[tuple[Change, Mapping[str, Any]]],
        origins: Mapping[str, Context] = _NO_ORIGINS,
    ) -> None:
        """Write the events of changes of state, each with its facts, and what the world hears of them.

        `origins` says of tasks whose request it was, where that is not the present one.
        """
        if told:
            await connection.execute(_INSERT_EVENT, [_event_columns(*each) for each in told])
            messages = [
                origins[each.task.task_id].run(self._encode, notice) if origins else self._encode(notice)
                for each, _ in told
                for notice in each.notices
            ]
            await self._outbox.add(connection, *messages)
            await self._owe(connection, [each.task for each, _ in told if each.task.state.ended])

    async def _owe(self, connection: AsyncConnection, tasks: Sequence[Task]) -> None:
        """Put the ends of tasks on their way to the webhooks that hear of them."""
        silent = {task.user_id for task in tasks if task.webhook_url is None}
        hearing = set((await connection.execute(_HEARING, {"user_ids": [*silent]})).scalars()) if silent else set()
        owed = []
        for task in tasks:
            if task.webhook_url is not None or task.user_id in hearing:
                kind, body = self._hook_body(task)
                delivery = Delivery(
                    delivery_id=ids.new("whd"),
                    user_id=task.user_id,
                    task_id=task.task_id,
                    sequence=task.sequence,
                    kind=kind,
                    url=task.webhook_url,
                    body=body,
                    state=DeliveryState.PENDING,
                    attempts=0,
                    tries=0,
                    status=None,
                    failure=None,
                    create_time=task.update_time,
                    attempt_time=None,
                    due_time=task.update_time,
                    expire_time=task.update_time + PATIENCE.whole,
                )
                owed.append(asdict(delivery))
        if owed:
            await connection.execute(insert(delivery_table), owed)


def listed(query: Query) -> Select[Any]:
    """Return what finds a page of a user's tasks, and one more where more follow."""
    if query.batch_id is None:
        among = task_table.c.user_id == query.user_id
    else:
        # A batch's tasks are its owner's. Asked for the user, too, SQLite would rather look through all that he has.
        own = (batch_table.c.batch_id == query.batch_id) & (batch_table.c.user_id == query.user_id)
        among = task_table.c.batch_id == select(batch_table.c.batch_id).where(own).scalar_subquery()
    found = (
        select(task_table)
        .where(among)
        .order_by(task_table.c.create_time.desc(), task_table.c.task_id.desc())
        .limit(query.size + 1)
    )
    if query.state is not None:
        found = found.where(task_table.c.state == query.state)
    if query.after is not None:
        place = tuple_(task_table.c.create_time, task_table.c.task_id)
        found = found.where(place < tuple_(*query.after, types=[Timestamp(), String()]))
    return found


async def _locked(connection: AsyncConnection, task_id: str) -> Task | None:
    found = select(task_table).where(task_table.c.task_id == task_id).with_for_update()
    row = (await connection.execute(found)).one_or_none()
    return None if row is None else _task(row)


async def _locked_together(connection: AsyncConnection, task_ids: Iterable[str]) -> tuple[dict[str, Task], datetime]:
    """Return those of the tasks that exist, locked, and the time."""
    rows = (await connection.execute(_LOCK, {"task_ids": [*task_ids]})).all()
    tasks = {row.task_id: _task(row) for row in rows}
    # Asked before the wait for the locks: not before what those did who held them.
    time = max([rows[0].now, *(each.update_time for each in tasks.values())]) if rows else await now(connection)
    return tasks, time


async def _batch(connection: AsyncConnection, batch_id: str) -> Batch | None:
    found = select(batch_table).where(batch_table.c.batch_id == batch_id)
    row = (await connection.execute(found)).one_or_none()
    if row is None:
        return None
    members = (
        select(task_table.c.state, func.count(), func.sum(task_table.c.progress_fraction))
        .where(task_table.c.batch_id == batch_id)
        .group_by(task_table.c.state)
    )
    states, done = {}, 0.0
    for name, count, fractions in await connection.execute(members):
        state = State(name)
        states[state] = count
        done += count if state.ended else fractions
    done += row.size - sum(states.values())  # those that ended so long ago that they are not kept
    return Batch(batch_id, row.user_id, row.create_time, row.size, states, done / row.size)


def _latest_turns() -> Select[Any]:
    """Return what finds the turn that a pool has come to, and the latest of a user's in it."""
    in_pool = task_table.c.pool == bindparam("pool")
    turn = select(task_table.c.turn)
    # The pool has come to the next turn of what nobody has claimed yet: unlike that of a task which comes back from a
    # worker, it never goes back. When all has been claimed, whoever comes now comes after it.
    never_claimed = turn.where(in_pool, QUEUED, task_table.c.start_time.is_(None)).order_by(task_table.c.turn).limit(1)
    latest = select(func.max(task_table.c.turn)).where(in_pool, UNENDED)
    of_user = turn.where(in_pool, UNENDED, task_table.c.user_id == bindparam("user_id"))
    present = func.coalesce(never_claimed.scalar_subquery(), latest.scalar_subquery(), 0)  # the second only if needed
    return select(present, of_user.order_by(task_table.c.turn.desc()).limit(1).scalar_subquery())


_LATEST_TURNS = _latest_turns()


async def _all_in_turn(connection: AsyncConnection, changes: Iterable[Change]) -> list[Change]:
    """Give tasks that several owners queue now their places."""
    groups: defaultdict[tuple[str, str, str], list[Change]] = defaultdict(list)
    for each in changes:
        groups[each.task.pool, each.task.user_id, each.task.role].append(each)
    # In one order, so that two who lock the same turns wait for each other and do not meet crosswise.
    return [placed for _, group in sorted(groups.items()) for placed in await _in_turn(connection, group)]


async def _in_turn(connection: AsyncConnection, changes: Sequence[Change]) -> list[Change]:
    """Give tasks that one owner queues now their places in the pool."""
    first = changes[0].task
    mine = {"pool": first.pool, "user_id": first.user_id}
    if (await connection.execute(_LOCK_TURNS, mine)).first() is None:
        await insert_if_absent(connection, taking_turns, mine)
        await connection.execute(_LOCK_TURNS, mine)
    found = (await connection.execute(_LATEST_TURNS, mine)).one()
    given = turns(first.role, present=found[0], last=found[1], count=len(changes))
    return [replace(each, task=replace(each.task, turn=own)) for each, own in zip(changes, given, strict=True)]


async def _next(connection: AsyncConnection, pool: str, count: int) -> Sequence[Row[Any]]:
    """Pick the tasks that a worker gets: of those that are due, the ones whose turn it is.

    Each row says too what time it is (`now`), and how many were due (`waiting`), counted up to one more than `count`.
    """
    wanted = {"pool": pool, "count": count, "count_and_one": count + 1}
    rows: Sequence[Row[Any]] = (await connection.execute(_NEXT, wanted)).all()
    return rows


def _due(pool: str | BindParameter[str], time: ColumnElement[datetime]) -> tuple[ColumnElement[bool] | TextClause, ...]:
    return (task_table.c.pool == pool, QUEUED, task_table.c.due_time <= time)


def _next_due() -> Select[Any]:
    due = _due(bindparam("pool"), clock())
    some = select(task_table.c.task_id).where(*due).limit(bindparam("count_and_one")).subquery()
    waiting = select(func.count()).select_from(some).scalar_subquery()
    return (
        select(task_table, clock().label("now"), waiting.label("waiting"))
        .where(*due)
        .order_by(task_table.c.turn, task_table.c.task_id)
        .limit(bindparam("count"))
        .with_for_update(skip_locked=True)
    )


_NEXT = _next_due()


def _among(query: Select[Any], table: Any, task_ids: Sequence[str]) -> Select[Any]:
    return query.where(table.c.task_id.in_(task_ids))


def _columns(task: Task) -> dict[str, Any]:
    return {
        "task_id": task.task_id,
        "user_id": task.user_id,
        "role": task.role,
        "pool": task.pool,
        "turn": task.turn,
        "input_file_id": task.input_file_id,
        "file_ids": list(task.file_ids),
        "operation": task.operation,
        "state": task.state,
        "sequence": task.sequence,
        "round": task.round,
        "attempt": task.attempt,
        "failures": task.failures,
        "progress_fraction": task.progress.fraction,
        "progress_stage": task.progress.stage,
        "output_file_ids": list(task.output_file_ids),
        "create_time": task.create_time,
        "start_time": task.start_time,
        "end_time": task.end_time,
        "update_time": task.update_time,
        "due_time": task.due_time,
        "lease_time": task.lease_time,
        "deadline_microseconds": task.deadline and task.deadline // _MICROSECOND,
        "deadline_time": task.deadline_time,
        "batch_id": task.batch_id,
        "request_id": task.request_id,
        "trace_id": task.trace_id,
        "dead_time": task.dead_time,
        "webhook_url": task.webhook_url,
        **_failure_columns(task.failure),
    }


def _task(row: Row[Any]) -> Task:
    return Task(
        task_id=row.task_id,
        user_id=row.user_id,
        role=row.role,
        pool=row.pool,
        turn=row.turn,
        input_file_id=row.input_file_id,
        file_ids=tuple(row.file_ids),
        operation=row.operation,
        state=State(row.state),
        sequence=row.sequence,
        round=row.round,
        attempt=row.attempt,
        failures=row.failures,
        progress=_progress(row),
        output_file_ids=tuple(row.output_file_ids),
        failure=_failure(row),
        create_time=row.create_time,
        start_time=row.start_time,
        end_time=row.end_time,
        update_time=row.update_time,
        due_time=row.due_time,
        lease_time=row.lease_time,
        deadline=None if row.deadline_microseconds is None else row.deadline_microseconds * _MICROSECOND,
        deadline_time=row.deadline_time,
        batch_id=row.batch_id,
        request_id=row.request_id,
        trace_id=row.trace_id,
        dead_time=row.dead_time,
        webhook_url=row.webhook_url,
    )


def _event_columns(change: Change, facts: Mapping[str, Any]) -> dict[str, Any]:
    task = change.task
    return {
        "task_id": task.task_id,
        "sequence": task.sequence,
        "state": task.state,
        "attempt": task.attempt,
        "reason": change.reason,
        "create_time": task.update_time,
        "facts": facts,
        **_failure_columns(task.failure),
    }


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if before.get(name) != value}


def _facts(changed: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that an event changed, as JSON, and those that change between events, too."""
    return {name: _to_json(row[name]) for name in changed.keys() | _UNTOLD}


def _first_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    return _facts(_changed({}, row), row)


def _told(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row that a task's events, oldest first, have made."""
    columns = dict[str, Any].fromkeys(task_table.c.keys())
    for each in facts:
        columns |= each
    return {name: _from_json(task_table.c[name], value) for name, value in columns.items()}


def _differing(rebuilt: Mapping[str, Any], present: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return the columns that differ, none when all is missing; None when the row is as its events say."""
    if present is None:
        return ()
    passing = _UNTOLD if rebuilt["state"] == State.RUNNING else frozenset()
    return tuple(name for name in rebuilt if name not in passing and rebuilt[name] != present[name]) or None


def _to_json(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case bytes():
            return b64encode(value).decode()
    return value


def _from_json(column: Column[Any], value: Any) -> Any:
    match column.type, value:
        case _, None:
            return None
        case Timestamp(), text:
            return datetime.fromisoformat(text)
        case LargeBinary(), text:
            return b64decode(text)
    return value


def _event(row: Row[Any]) -> Event:
    return Event(
        sequence=row.sequence,
        state=State(row.state),
        attempt=row.attempt,
        reason=row.reason,
        failure=_failure(row),
        create_time=row.create_time,
    )


def _progress(row: Row[Any]) -> Progress:
    return Progress(row.progress_fraction, row.progress_stage)


def _failure_columns(failure: Failure | None) -> dict[str, Any]:
    return {
        "failure_code": failure and failure.code,
        "failure_message": failure and failure.message,
        "failure_reason": failure and failure.reason,
    }


def _failure(row: Row[Any]) -> Failure | None:
    return None if row.failure_code is None else Failure(row.failure_code, row.failure_message, row.failure_reason)
