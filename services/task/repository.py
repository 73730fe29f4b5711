"""Tasks in a SQL database. Knows no protobuf: what a change tells the world is encoded by a function it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, String, TextClause, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import idempotency, outbox
from mesh.database import Database, Timestamp, insert_if_absent, now
from services.task.domain import (
    Change,
    Event,
    Failure,
    History,
    Notice,
    Page,
    Progress,
    Query,
    State,
    Step,
    Task,
    Version,
    require_found,
)
from services.task.tables import QUEUED, RUNNING, UNENDED, idempotency_table, outbox_table
from services.task.tables import task as task_table
from services.task.tables import task_event as event_table

_MICROSECOND = timedelta(microseconds=1)


class SqlTasks:
    """Satisfies `domain.Tasks`. One transaction per method.

    Args:
        database: where they are.
        encode: makes the message of a notice; it leaves with the transaction.
    """

    def __init__(self, database: Database, encode: Callable[[Notice], outbox.Message]) -> None:
        self._database = database
        self._encode = encode
        self._listeners: tuple[Callable[[str], None], ...] = ()

    def after_commit(self, *listeners: Callable[[str], None]) -> None:
        """Call each of `listeners` with a task's id after every change of it from now on."""
        self._listeners = listeners

    async def adopt(self, user_id: str, key: str, fingerprint: bytes, new_id: str) -> str:
        async with self._database.transaction() as connection:
            task_id, _ = await idempotency.adopt(
                connection,
                idempotency_table,
                caller=user_id,
                method="CreateTask",
                key=key,
                fingerprint=fingerprint,
                new_id=new_id,
            )
        return task_id

    async def add(self, task_id: str, created: Callable[[datetime], Change]) -> Task:
        async with self._database.transaction() as connection:
            present = await _locked(connection, task_id)
            if present is not None:
                return present
            change = created(await now(connection))
            if not await insert_if_absent(connection, task_table, _columns(change.task)):
                # On PostgreSQL another call with the same key can slip in between: its task is ours.
                return require_found(await _locked(connection, task_id), task_id)
            await self._tell(connection, change)
        self._committed(task_id)
        return change.task

    async def change(self, task_id: str, step: Step, *, owner: str | None = None) -> Task:
        async with self._database.transaction() as connection:
            task = require_found(await _locked(connection, task_id), task_id, owner)
            change = await self._take(connection, task, step)
        if change.task.version != task.version:
            self._committed(task_id)
        return change.task

    async def claim(self, pool: str, step: Step) -> Task | None:
        async with self._database.transaction() as connection:
            task = await _next(connection, pool)
            if task is None:
                return None
            change = await self._take(connection, task, step)
        self._committed(task.task_id)
        return change.task

    async def find(self, task_id: str) -> Task | None:
        async with self._database.reading() as connection:
            row = (await connection.execute(select(task_table).where(task_table.c.task_id == task_id))).one_or_none()
        return None if row is None else _task(row)

    async def page(self, query: Query) -> Page:
        place = tuple_(task_table.c.create_time, task_table.c.task_id)
        found = (
            select(task_table)
            .where(task_table.c.user_id == query.user_id)
            .order_by(task_table.c.create_time.desc(), task_table.c.task_id.desc())
            .limit(query.size + 1)
        )
        if query.state is not None:
            found = found.where(task_table.c.state == query.state)
        if query.after is not None:
            found = found.where(place < tuple_(*query.after, types=[Timestamp(), String()]))
        async with self._database.reading() as connection:
            tasks = [_task(row) for row in await connection.execute(found)]
        return Page(tasks[: query.size], len(tasks) > query.size)

    async def histories(self, task_ids: Sequence[str]) -> list[History]:
        events: dict[str, list[Event]] = {}
        async with self._database.reading() as connection:
            tasks = [_task(row) for row in await connection.execute(_among(select(task_table), task_table, task_ids))]
            past = _among(select(event_table), event_table, task_ids).order_by(event_table.c.sequence)
            for row in await connection.execute(past):
                events.setdefault(row.task_id, []).append(_event(row))
        return [History(task, tuple(events[task.task_id])) for task in tasks]

    async def versions(self, task_ids: Sequence[str]) -> dict[str, Version]:
        columns = select(
            task_table.c.task_id,
            task_table.c.sequence,
            task_table.c.progress_fraction,
            task_table.c.progress_stage,
        )
        async with self._database.reading() as connection:
            rows = await connection.execute(_among(columns, task_table, task_ids))
            return {row.task_id: (row.sequence, _progress(row)) for row in rows}

    async def lapsed(self, limit: int) -> list[str]:
        async with self._database.reading() as connection:
            found = (
                select(task_table.c.task_id)
                .where(RUNNING, task_table.c.lease_time < await now(connection))
                .order_by(task_table.c.lease_time)
                .limit(limit)
            )
            return list((await connection.execute(found)).scalars())

    async def late(self, limit: int) -> list[str]:
        async with self._database.reading() as connection:
            found = (
                select(task_table.c.task_id)
                .where(UNENDED, task_table.c.deadline_time < await now(connection))
                .order_by(task_table.c.deadline_time)
                .limit(limit)
            )
            return list((await connection.execute(found)).scalars())

    async def overdue(self, pool: str, waited: timedelta) -> int:
        async with self._database.reading() as connection:
            due = _due(pool, await now(connection) - waited)
            return (await connection.execute(select(func.count()).where(*due))).scalar_one()

    async def forget(self) -> None:
        async with self._database.transaction() as connection:
            await idempotency.forget(connection, idempotency_table)

    def _committed(self, task_id: str) -> None:
        for listener in self._listeners:
            listener(task_id)

    async def _take(self, connection: AsyncConnection, task: Task, step: Step) -> Change:
        change = step(task, await now(connection))
        if change.task != task:
            await connection.execute(
                update(task_table).where(task_table.c.task_id == task.task_id).values(_columns(change.task))
            )
        if change.task.sequence != task.sequence:
            await self._tell(connection, change)
        return change

    async def _tell(self, connection: AsyncConnection, change: Change) -> None:
        """Write the event of a change of state, and what the world hears of it."""
        task = change.task
        await connection.execute(
            insert(event_table).values(
                task_id=task.task_id,
                sequence=task.sequence,
                state=task.state,
                attempt=task.attempt,
                reason=change.reason,
                create_time=task.update_time,
                **_failure_columns(task.failure),
            )
        )
        await outbox.add(connection, outbox_table, *map(self._encode, change.notices))


async def _locked(connection: AsyncConnection, task_id: str) -> Task | None:
    found = select(task_table).where(task_table.c.task_id == task_id).with_for_update()
    row = (await connection.execute(found)).one_or_none()
    return None if row is None else _task(row)


async def _next(connection: AsyncConnection, pool: str) -> Task | None:
    """Pick the task that a worker gets: the one that has been due for longest."""
    found = (
        select(task_table)
        .where(*_due(pool, await now(connection)))
        .order_by(task_table.c.due_time, task_table.c.task_id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = (await connection.execute(found)).one_or_none()
    return None if row is None else _task(row)


def _due(pool: str, time: datetime) -> tuple[ColumnElement[bool] | TextClause, ...]:
    return (task_table.c.pool == pool, QUEUED, task_table.c.due_time <= time)


def _among(query: Select[Any], table: Any, task_ids: Sequence[str]) -> Select[Any]:
    return query.where(table.c.task_id.in_(task_ids))


def _columns(task: Task) -> dict[str, Any]:
    return {
        "task_id": task.task_id,
        "user_id": task.user_id,
        "pool": task.pool,
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
        **_failure_columns(task.failure),
    }


def _task(row: Row[Any]) -> Task:
    return Task(
        task_id=row.task_id,
        user_id=row.user_id,
        pool=row.pool,
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
    )


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
