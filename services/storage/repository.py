"""Files in a SQL database."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Row, bindparam, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import idempotency, ids, inbox, lock
from mesh.database import Database, advisory_lock, clock, insert_if_absent, unless_there
from services.storage.domain import (
    SWEEP,
    File,
    FileNotFound,
    NewFile,
    Origin,
    Turn,
    Usage,
    Work,
    complete,
    fingerprint,
    named_after,
)
from services.storage.tables import debt, file, idempotency_table, inbox_table, lock_table, making

# Rows that one round of upkeep takes at most, so that a round stays short; any of them, not the oldest: as many that
# fail each time would hold up all others for ever.
SOME = 100
EVENTS_KEPT = timedelta(days=7)  # far longer than the broker redelivers


def _visible(user_id: str | BindParameter[str], file_id: str | BindParameter[str]) -> ColumnElement[bool]:
    return (file.c.file_id == file_id) & (file.c.user_id == user_id) & file.c.ready


# Made once, as all that is sent for each task or result: making a statement costs as much as sending it.
_GET = select(file).where(_visible(bindparam("of_user"), bindparam("key")))
_SOME = select(file).where(
    file.c.file_id.in_(bindparam("keys", expanding=True)),
    file.c.user_id == bindparam("of_user"),
    file.c.ready,
    file.c.confirmed,
)
_READY = update(file).where(file.c.file_id == bindparam("key")).values(ready=True).returning(*file.c)
_MADE = (
    select(file).where(file.c.work == bindparam("key"), file.c.ready).order_by(file.c.create_time.desc()).limit(SOME)
)
_RELEASE = delete(making).where(making.c.task_id == bindparam("of_task"), making.c.attempt == bindparam("of_attempt"))
_CONFIRM = (
    update(file)
    .where(file.c.file_id == bindparam("key"), file.c.task_id == bindparam("of_task"))
    .values(confirmed=True)
)


class SqlFiles:
    """Satisfies `domain.Files`. One transaction per method."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, new: NewFile, request_id: str) -> File:
        async with self._database.transaction() as connection:
            await advisory_lock(connection, new.sha256)  # see `unused`
            if request_id and new.task_id is None:
                file_id, fresh = await idempotency.adopt(
                    connection,
                    idempotency_table,
                    caller=new.user_id,
                    method="UploadFile",
                    key=request_id,
                    fingerprint=fingerprint(new),
                    new_id=new.file_id,
                )
                first = None if fresh else await _one(connection, file.c.file_id == file_id)
                if first is not None:
                    return first
            return await _begun(connection, new)

    async def finish(self, file_id: str) -> File | None:
        async with self._database.transaction() as connection:
            row = (await connection.execute(_READY, {"key": file_id})).one_or_none()
            if row is None:
                return None
            finished = _from_row(row)
            if finished.origin is not None and (
                finished.origin.count == 1 or await _is_complete(connection, finished.task_id, finished.attempt)
            ):
                await _release(connection, finished.task_id, finished.attempt)
            return finished

    async def take(self, work: Work, lease_seconds: float) -> tuple[Turn, Sequence[File]]:
        until = clock(timedelta(seconds=lease_seconds))
        turn = {"task_id": work.task_id, "attempt": work.attempt}
        async with self._database.transaction() as connection:
            new = unless_there(connection, making, making.c.work).values(until=until)
            while True:
                # The turn before the results: whoever makes them has it until they are there.
                if (await connection.execute(new, {"work": work.key, **turn})).one_or_none() is not None:
                    if taken := await _taken(connection, work):
                        await _release(connection, work.task_id, work.attempt)
                        return Turn.TAKE, taken
                    return Turn.MAKE, []
                await advisory_lock(connection, work.key)  # of those who find it taken, one at a time decides
                standing = select(making, (making.c.until > clock()).label("lasts")).where(making.c.work == work.key)
                row = (await connection.execute(standing)).one_or_none()
                if row is None:
                    continue  # it has just ended
                if (row.task_id, row.attempt) != (work.task_id, work.attempt):
                    if taken := await _taken(connection, work):
                        return Turn.TAKE, taken
                    if row.lasts:
                        return Turn.WAIT, []
                taking = update(making).where(making.c.work == work.key, making.c.task_id == row.task_id)
                if (await connection.execute(taking.values(**turn, until=until))).rowcount:
                    return Turn.MAKE, []

    async def release(self, task_id: str, attempt: int) -> None:
        async with self._database.statement() as connection:
            await _release(connection, task_id, attempt)

    async def undo(self, begun: File) -> bool:
        this = file.c.file_id == begun.file_id
        async with self._database.transaction() as connection:
            if await _take_away(connection, this & ~file.c.ready) is not None:
                return True
            if await _one(connection, this) is not None:
                return False  # a twin of the call, with the same request id, made it ready
            await _owe(connection, begun)  # undone before, perhaps released by an earlier release: once more
            return True

    async def get(self, user_id: str, file_id: str) -> File:
        async with self._database.query() as connection:
            row = (await connection.execute(_GET, {"key": file_id, "of_user": user_id})).one_or_none()
        return _required(None if row is None else _from_row(row), file_id)

    async def some(self, user_id: str, file_ids: Collection[str]) -> Sequence[File]:
        async with self._database.query() as connection:
            rows = await connection.execute(_SOME, {"keys": [*file_ids], "of_user": user_id})
            return [_from_row(row) for row in rows]

    async def page(self, user_id: str, size: int, before: str | None) -> Sequence[File]:
        # Ids are time-ordered, so the newest come first.
        rows = select(file).where(file.c.user_id == user_id, file.c.ready, file.c.confirmed)
        if before is not None:
            rows = rows.where(file.c.file_id < before)
        rows = rows.order_by(file.c.file_id.desc()).limit(size)
        async with self._database.query() as connection:
            return [_from_row(row) for row in await connection.execute(rows)]

    async def usage(self, user_id: str) -> Usage:
        total = select(func.count(), func.coalesce(func.sum(file.c.size_bytes), 0))
        async with self._database.query() as connection:
            count, size = (await connection.execute(total.where(file.c.user_id == user_id, file.c.ready))).one()
        return Usage(file_count=count, size_bytes=int(size))

    async def delete(self, user_id: str, file_id: str, request_id: str) -> File | None:
        key = f"{request_id}/{file_id}"
        async with self._database.transaction() as connection:
            _, first = await idempotency.adopt(
                connection,
                idempotency_table,
                caller=user_id,
                method="DeleteFile",
                key=key,
                fingerprint=b"",
                new_id=key,
            )
            if not first:
                return None
            return _required(await _take_away(connection, _visible(user_id, file_id)), file_id)

    async def results(self, task_id: str, attempt: int) -> Sequence[File]:
        rows = select(file).where(_of_attempt(task_id, attempt)).order_by(file.c.result_index)
        async with self._database.query() as connection:
            return [_from_row(row) for row in await connection.execute(rows)]

    async def confirm(self, task_id: str, file_id: str) -> None:
        async with self._database.statement() as connection:
            await _confirm(connection, [(task_id, file_id)])

    async def follow(self, results: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        async with self._database.transaction() as connection:
            fresh = await inbox.first_time(connection, inbox_table, "storage.events", results)
            await _confirm(connection, sorted(each for event_id in fresh for each in results[event_id]))

    async def refuse(self, file_id: str) -> bool:
        async with self._database.transaction() as connection:
            return await _take_away(connection, (file.c.file_id == file_id) & ~file.c.confirmed) is not None

    async def stale(self, age_seconds: float) -> Sequence[File]:
        return await self._older(age_seconds, ~file.c.ready)

    async def unconfirmed(self, age_seconds: float) -> Sequence[File]:
        return await self._older(age_seconds, file.c.ready & ~file.c.confirmed)

    async def debts(self) -> Mapping[str, str | None]:
        rows = select(debt.c.file_id, debt.c.user_id).order_by(func.random()).limit(SOME)
        async with self._database.query() as connection:
            return {row.file_id: row.user_id for row in await connection.execute(rows)}

    async def pay(self, file_id: str) -> None:
        async with self._database.statement() as connection:
            await connection.execute(delete(debt).where(debt.c.file_id == file_id))

    async def known_contents(self, prefix: str) -> Collection[str]:
        # "g" comes after every hexadecimal digit; a range uses the index, as LIKE would not.
        known = select(file.c.sha256).distinct().where(file.c.sha256.between(prefix, prefix + "g"))
        async with self._database.query() as connection:
            return set((await connection.execute(known)).scalars())

    async def used(self, contents: Collection[str]) -> Collection[str]:
        known = select(file.c.sha256).distinct().where(file.c.sha256.in_(contents))
        async with self._database.query() as connection:
            return set((await connection.execute(known)).scalars())

    @asynccontextmanager
    async def unused(self, sha256: str, fence: int | None = None) -> AsyncIterator[bool]:
        # It stays so: no row can come while this transaction lasts, since `begin` takes the same lock, and an upload
        # brings its own bytes after its row.
        async with self._database.transaction() as connection:
            if fence is not None:
                await lock.require(connection, lock_table, SWEEP, fence)
            await advisory_lock(connection, sha256)
            yield await _one(connection, file.c.sha256 == sha256) is None

    async def forget(self, fence: int) -> None:
        more = True
        while more:
            async with self._database.transaction() as connection:
                await lock.require(connection, lock_table, SWEEP, fence)
                # Of attempts that ended without a word; the next one would have taken their place.
                await connection.execute(delete(making).where(making.c.until < clock()))
                keys = await idempotency.forget(connection, idempotency_table)
                more = await inbox.forget(connection, inbox_table, EVENTS_KEPT) or keys

    async def _older(self, age_seconds: float, which: ColumnElement[bool]) -> Sequence[File]:
        before = clock(timedelta(seconds=-age_seconds))
        rows = select(file).where(which, file.c.create_time < before).order_by(func.random()).limit(SOME)
        async with self._database.query() as connection:
            return [_from_row(row) for row in await connection.execute(rows)]


async def _begun(connection: AsyncConnection, new: NewFile) -> File:
    """Store the row of a file, not ready, or return what stands in its place; under the lock of its content."""
    row = {**dataclasses.asdict(new), "ready": False, "confirmed": new.task_id is None}
    added = unless_there(connection, file, *file.c)
    # Only a result can be in another's way: what its attempt wrote first under its index.
    same = _of_attempt(new.task_id, new.attempt) & (file.c.result_index == new.result_index)
    while (begun := (await connection.execute(added, row)).one_or_none()) is None:
        first = await _one(connection, same)
        if first is not None and (first.ready or first.sha256 == new.sha256):
            return first
        # An earlier write broke off with other bytes: this one takes its place.
        await _take_away(connection, same & ~file.c.ready)
    return _from_row(begun)


async def _is_complete(connection: AsyncConnection, task_id: str | None, attempt: int | None) -> bool:
    """Tell whether an attempt has all its results here."""
    ready = select(file).where(_of_attempt(task_id, attempt) & file.c.ready)
    return bool(complete([_from_row(row) for row in await connection.execute(ready)]))


async def _taken(connection: AsyncConnection, work: Work) -> Sequence[File]:
    """Begin files of the contents that equal work has made; none when they are not all here."""
    found = complete([_from_row(row) for row in await connection.execute(_MADE, {"key": work.key})])
    if not found:
        return []
    for sha256 in sorted({each.sha256 for each in found}):
        await advisory_lock(connection, sha256)  # see `unused`
    # Once more, under their locks: a content whose last row went meanwhile may be gone.
    again = select(func.count()).where(file.c.file_id.in_([each.file_id for each in found]), file.c.ready)
    if (await connection.execute(again)).scalar_one() < len(found):
        return []
    return [
        await _begun(
            connection,
            NewFile(
                file_id=ids.new("fil"),
                user_id=work.user_id,
                name=named_after(work.input_name, origin.name_ending),
                content_type=each.content_type,
                size_bytes=each.size_bytes,
                sha256=each.sha256,
                task_id=work.task_id,
                attempt=work.attempt,
                result_index=each.result_index,
                work=work.key,
                origin=dataclasses.replace(work.origin, name_ending=origin.name_ending, count=origin.count),
            ),
        )
        for each in found
        if (origin := each.origin) is not None
    ]


async def _release(connection: AsyncConnection, task_id: str | None, attempt: int | None) -> None:
    await connection.execute(_RELEASE, {"of_task": task_id, "of_attempt": attempt})


def _of_attempt(task_id: str | None, attempt: int | None) -> ColumnElement[bool]:
    return (file.c.task_id == task_id) & (file.c.attempt == attempt)


async def _confirm(connection: AsyncConnection, results: Sequence[tuple[str, str]]) -> None:
    """Note that tasks took their results, (task, file)."""
    if results:
        rows = [{"of_task": task_id, "key": file_id} for task_id, file_id in results]
        await connection.execute(_CONFIRM, rows)


async def _one(connection: AsyncConnection, which: ColumnElement[bool]) -> File | None:
    row = (await connection.execute(select(file).where(which).limit(1))).one_or_none()
    return None if row is None else _from_row(row)


async def _take_away(connection: AsyncConnection, which: ColumnElement[bool]) -> File | None:
    """Delete a row with its request id, and note the debt."""
    # Looked at and deleted by one statement: nobody can make it ready, or take it, in between.
    row = (await connection.execute(delete(file).where(which).returning(*file.c))).one_or_none()
    taken = None if row is None else _from_row(row)
    if taken is not None:
        # A later call with the key must not be told of a file that is no more.
        await connection.execute(delete(idempotency_table).where(idempotency_table.c.resource_id == taken.file_id))
        await _owe(connection, taken)
    return taken


async def _owe(connection: AsyncConnection, gone: File) -> None:
    await insert_if_absent(connection, debt, {"file_id": gone.file_id, "user_id": gone.user_id})


def _required(found: File | None, file_id: str) -> File:
    if found is None:
        raise FileNotFound(f"There is no file {file_id}.", metadata={"file_id": file_id})
    return found


def _from_row(row: Row[Any]) -> File:
    columns = row._asdict()
    origin = columns.pop("origin")
    return File(**columns, origin=origin and Origin(**origin))
