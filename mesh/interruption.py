"""SQLite connections that stop working when nobody waits for them any more.

A statement of SQLite runs in a thread, which does not hear that its caller was cancelled: left alone it reads on to
its end, a writer's with the database's lock in its hands.

A statement goes to the thread once and comes back with its rows: the way there and back costs more than most
statements, and the driver goes it four times.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import aiosqlite
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

LOOK_MS = 50  # how long SQLite itself may wait for a lock: meanwhile it hears nothing
AGAIN_SECONDS = 0.01  # between two interruptions: one that comes before its statement has begun is not heard

# What ends a transaction is short and goes to its end, so that its caller finds it either done or not.
_TO_THE_END = frozenset({"commit", "rollback", "close"})


def connect(path: str, **settings: Any) -> aiosqlite.Connection:
    """Return a connection to a file, for SQLAlchemy's `async_creator_fn`; `settings` are those of `sqlite3.connect`."""
    connection = _Interruptible(partial(sqlite3.connect, path, **settings), iter_chunk_size=64)
    connection._thread.daemon = True  # noqa: SLF001 - as SQLAlchemy does to those that it makes itself
    return connection


def begin_immediate(connection: Connection, within_seconds: float) -> None:
    """Begin a transaction that writes, waiting for another process's in looks of `LOOK_MS`, between which it hears.

    Raises:
        OperationalError: the lock could not be had in time, or the database is away.
    """
    give_up = time.monotonic() + within_seconds
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except OperationalError as failure:
            code = getattr(failure.orig, "sqlite_errorcode", 0) & 0xFF  # the primary one: a log's recovery is busy, too
            if code != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        else:
            return


class _Cursor(aiosqlite.Cursor):
    """Has all rows of its statement when that has ended; there is none before it has begun."""

    def __init__(self, connection: _Interruptible) -> None:
        super().__init__(connection, None)  # type: ignore[arg-type]  # none yet
        self._rows: list[Any] = []

    async def execute(self, sql: str, parameters: Any = None) -> _Cursor:
        self._rows = await self._execute(self._all_rows, sql, parameters or ())  # type: ignore[no-untyped-call]  # the driver's own
        return self

    async def executemany(self, sql: str, parameters: Any) -> _Cursor:
        await self._execute(self._all_done, sql, parameters)  # type: ignore[no-untyped-call]  # likewise
        return self

    async def fetchall(self) -> list[Any]:
        return self._rows

    async def close(self) -> None:
        """Do nothing: whatever had an end has been reset by it."""

    def _all_rows(self, sql: str, parameters: Any) -> list[Any]:
        self._cursor = self._conn._conn.execute(sql, parameters)  # noqa: SLF001 - the driver's own
        return self._cursor.fetchall()

    def _all_done(self, sql: str, parameters: Any) -> None:
        self._cursor = self._conn._conn.executemany(sql, parameters)  # noqa: SLF001 - likewise


class _Interruptible(aiosqlite.Connection):
    def cursor(self) -> _Cursor:  # type: ignore[override]  # SQLAlchemy asks for no more
        return _Cursor(self)

    async def commit(self) -> None:
        if self._conn.in_transaction:  # a query has none, see `Database.query`
            await super().commit()

    async def rollback(self) -> None:
        if self._conn.in_transaction:  # whatever goes back to the pool is asked to
            await super().rollback()

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._execute(fn, *args, **kwargs)  # type: ignore[no-untyped-call]  # the driver's own
        except asyncio.CancelledError:
            interrupting = getattr(fn, "__name__", "") not in _TO_THE_END
            await self._idle(lambda: None, interrupting=interrupting)
            if interrupting:  # its lock is for the next one at once; SQLAlchemy closes the connection behind our back
                await self._idle(self._conn.rollback, interrupting=False)
            raise

    async def _idle(self, last: Callable[[], None], *, interrupting: bool) -> None:
        """Return when the thread has nothing left to do after `last`, and be cancelled no second time meanwhile."""
        idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((idle, last))
        while not idle.done():
            if interrupting:
                self._conn.interrupt()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([idle], timeout=AGAIN_SECONDS)
