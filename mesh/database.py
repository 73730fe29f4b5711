"""A service's own SQL database: connections, transactions, its clock. All that differs by dialect is here.

Holds no tables and no queries of any service.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Dialect,
    Table,
    delete,
    event,
    literal_column,
    make_url,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoFreeConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.types import TypeDecorator

from mesh.errors import FailedPrecondition, Unavailable

log = logging.getLogger(__name__)

READERS = 4  # SQLite reads from the page cache: more threads than this only compete for the interpreter
BUSY_TIMEOUT_MS = 5_000  # how long a writer waits for another process's writer
BUSY_PAUSE_SECONDS = 0.01  # between two looks, where SQLite itself does not wait
WRITER_WAIT_SECONDS = 10.0  # how long a task waits for its own process's one writer

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# Primary result codes (sqlite.org/rescode.html) that pass without a change of code: a full disk, a lock, a lost file.
# READONLY is not among them: it is what a write on a reading connection gets, and that is a bug.
_SQLITE_OUTAGES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    }
)

_NOW = {
    # julianday is exact to about 40 µs in the present century; rounded to the millisecond that SQLite's clock has.
    "sqlite": "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000",
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)",
}


class DatabaseNotSupported(FailedPrecondition):
    reason = "DATABASE_NOT_SUPPORTED"


class Timestamp(TypeDecorator[datetime]):
    """An aware UTC `datetime`, kept as microseconds since 1970 in a BIGINT: exact, and it sorts everywhere."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002 - SQLAlchemy's signature
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime cannot be stored: say which zone it is in")
        return (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - SQLAlchemy's signature
        return None if value is None else _EPOCH + value * _MICROSECOND


class Database:
    """One database: many readers and, with SQLite, one writer a process."""

    def __init__(self, writer: AsyncEngine, readers: AsyncEngine) -> None:
        self._writer = writer
        self._readers = readers

    def transaction(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that may write: committed at the end of the block, rolled back if it raises.

        Await nothing but this connection inside it: with SQLite every other writer waits meanwhile, and
        opening a second one inside the first would wait for itself.

        Raises:
            Unavailable: the database is locked, full, or away.
        """
        return _begun(self._writer)

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that reads one snapshot and cannot write.

        Raises:
            Unavailable: the database is away.
        """
        return _begun(self._readers)

    async def check(self) -> None:
        """Raise Unavailable unless the database answers: a dependency of `mesh.service.serve`."""
        async with self.reading() as connection:
            await connection.execute(text("SELECT 1"))


@asynccontextmanager
async def opened(url: str, *, foreign_keys: bool = True) -> AsyncIterator[Database]:
    """Open the database at an SQLAlchemy URL such as `sqlite+aiosqlite:////var/lib/atelier/task.db`.

    A missing SQLite file is made, readable by its owner only. Only migrations do without `foreign_keys`.

    Raises:
        DatabaseNotSupported: the URL names something other than a SQLite file.
    """
    path = sqlite_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made here because SQLite would obey the umask; its -wal and -shm files take this file's mode.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    await _write_ahead(path)

    writer = _sqlite_engine(url, begin="BEGIN IMMEDIATE", pool_size=1, foreign_keys=foreign_keys)
    readers = _sqlite_engine(url, begin="BEGIN", pool_size=READERS, query_only=True)
    try:
        yield Database(writer, readers)
    finally:
        await readers.dispose()
        await writer.dispose()


def sqlite_path(url: str) -> Path:
    """Return the file that a SQLite URL names.

    Raises:
        DatabaseNotSupported: the URL names something else.
    """
    parsed = make_url(url)
    if parsed.drivername != "sqlite+aiosqlite" or parsed.database in {None, "", ":memory:"}:
        # The rest of the URL may hold a password.
        raise DatabaseNotSupported(
            "A database is a SQLite file for now: sqlite+aiosqlite:///<path>.", metadata={"scheme": parsed.drivername}
        )
    return Path(str(parsed.database))


async def now(connection: AsyncConnection) -> datetime:
    """Return the database's clock, aware, UTC: the only judge of leases, since replicas' clocks differ."""
    time: datetime = (
        await connection.execute(select(literal_column(_NOW[connection.dialect.name], Timestamp)))
    ).scalar_one()
    return time


async def insert_if_absent(connection: AsyncConnection, table: Table, values: Mapping[str, Any]) -> bool:
    """Insert a row; return False, changing nothing, when one of its unique keys is already there."""
    if connection.dialect.name == "postgresql":
        result = await connection.execute(postgresql.insert(table).values(values).on_conflict_do_nothing())
    else:
        result = await connection.execute(sqlite.insert(table).values(values).on_conflict_do_nothing())
    return result.rowcount == 1


async def delete_some(connection: AsyncConnection, table: Table, old: ColumnElement[bool], *, at_most: int) -> bool:
    """Delete rows for which `old` holds, up to `at_most`; return whether more may be left.

    One statement that deletes everything would hold up all who write until it is done. Several replicas may delete at
    once: each row goes once.
    """
    key = tuple_(*table.primary_key.columns)
    some = select(*table.primary_key.columns).where(old).limit(at_most)
    return (await connection.execute(delete(table).where(key.in_(some)))).rowcount == at_most


@asynccontextmanager
async def _begun(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        async with engine.begin() as connection:
            yield connection
    except NoFreeConnection as failure:
        raise Unavailable("The database is busy. Try again.", retry_after_seconds=1) from failure
    except DBAPIError as failure:
        if not _is_outage(failure):
            raise
        raise _unavailable(failure.orig) from failure


def _unavailable(failure: BaseException | None) -> Unavailable:
    """Tell the log what the driver said, and the caller that it may try again."""
    log.warning("database unavailable", extra={"driver_error": str(failure)})
    return Unavailable("The database cannot answer now. Try again.", retry_after_seconds=1)


def _is_outage(failure: DBAPIError) -> bool:
    code = getattr(failure.orig, "sqlite_errorcode", None)
    if code is None:
        return failure.connection_invalidated or isinstance(failure, OperationalError)
    return code & 0xFF in _SQLITE_OUTAGES  # the low byte is the primary code


async def _write_ahead(path: Path) -> None:
    """Have the file keep a write-ahead log, from now on: it says so itself to whoever opens it.

    Raises:
        Unavailable: another process writes to it, or it cannot be written.
    """
    give_up = asyncio.get_running_loop().time() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as failure:
            # SQLite waits for nobody here, since two that change the mode at once would wait for each other.
            if failure.sqlite_errorcode != sqlite3.SQLITE_BUSY or asyncio.get_running_loop().time() > give_up:
                raise _unavailable(failure) from failure
            await asyncio.sleep(BUSY_PAUSE_SECONDS * random.uniform(1, 2))  # noqa: S311 - jitter, not a secret
        else:
            return


def _sqlite_engine(
    url: str, *, begin: str, pool_size: int, foreign_keys: bool = True, query_only: bool = False
) -> AsyncEngine:
    engine = create_async_engine(
        url,
        # The driver's own BEGIN is deferred and comes late: two read-then-write transactions would then fail "locked"
        # however long they may wait. None leaves transactions to the statement below.
        connect_args={"isolation_level": None},
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=WRITER_WAIT_SECONDS,
    )

    def connected(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA synchronous = FULL")  # WAL's usual NORMAL may lose commits when power fails
        cursor.execute(f"PRAGMA foreign_keys = {foreign_keys:d}")
        if query_only:
            cursor.execute("PRAGMA query_only = ON")
        cursor.close()

    event.listen(engine.sync_engine, "connect", connected)
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine
