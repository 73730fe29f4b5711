"""A service's own SQL database: connections, transactions, its clock. All that differs by dialect is here.

Holds no tables and no queries of any service.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from select import POLLIN, poll
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Insert,
    Table,
    delete,
    event,
    func,
    literal_column,
    make_url,
    select,
    text,
    tuple_,
    type_coerce,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as NoFreeConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from mesh import interruption
from mesh.errors import FailedPrecondition, Unavailable

log = logging.getLogger(__name__)

READERS = 4  # SQLite reads from the page cache: more threads than this only compete for the interpreter
BUSY_TIMEOUT_MS = 5_000  # how long a writer waits for another process's writer
BUSY_PAUSE_SECONDS = 0.01  # between two looks, where SQLite itself does not wait
WRITER_WAIT_SECONDS = 10.0  # how long a task waits for one of its own process's connections

CONNECTIONS = 5  # to PostgreSQL, of a process, for writing and again for reading: eight processes fit in its usual 100
POSTGRESQL_TIMEOUTS = {
    "lock_timeout": "5s",  # as long as SQLite's writers wait for each other
    # The bounds of what nobody waits for any more: a caller's deadline cancels its statement long before.
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "30s",
}
POSTGRESQL_SETTINGS = {
    **POSTGRESQL_TIMEOUTS,
    # Compiling a statement takes 6 to 100 ms of a core, each time anew, and our statements take less than one. The
    # planner does it for what it believes dear, such as the outbox's rows by statistics of a minute ago.
    "jit": "off",
}
# What the URL says wins: `?options=`, say, for a PgBouncer that takes no settings.
_POSTGRESQL_CONNECTION: dict[str, str | int] = {
    "options": " ".join(f"-c {name}={value}" for name, value in POSTGRESQL_SETTINGS.items()),
    "connect_timeout": 5,
    # A server that vanished without a word is noticed after about 10 s, also by whoever waits for its answer.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

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

_ALONE = "alone"  # of a connection: its statements need no BEGIN
_ENDED = "ended"  # where a connection keeps who is told of its transaction's end


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


class _Clock(FunctionElement[int]):
    """Microseconds since 1970."""

    type = BigInteger()
    inherit_cache = True


@compiles(_Clock, "sqlite")
def _sqlite_clock(*_: object, **__: object) -> str:
    # julianday is exact to about 40 µs in the present century; rounded to the millisecond that SQLite's clock has.
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000"


@compiles(_Clock, "postgresql")
def _postgresql_clock(*_: object, **__: object) -> str:
    # Of the statement's begin: one value in all of it, so that an index can be looked up by it.
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) * 1000000 AS BIGINT)"


class Database:
    """One database: many readers and, with SQLite, one writer a process.

    With PostgreSQL writers are many, and each statement of one sees what had been committed when that statement began
    (READ COMMITTED). Whoever looks and then writes must make sure that what was seen still holds: by a condition in
    the write itself, a unique key, `with_for_update` on the row, or `advisory_lock` where there is no row. SQLite's
    one writer needs none of it and ignores the locks.
    """

    def __init__(self, writer: AsyncEngine, readers: AsyncEngine, file: Path | None = None) -> None:
        self._writer = writer
        self._readers = readers
        self._file = file
        # Of the same pools.
        is_postgresql = writer.dialect.name == "postgresql"
        self._single_writer = writer.execution_options(**({"isolation_level": "AUTOCOMMIT"} if is_postgresql else {}))
        self._snapshots = readers.execution_options(**({"isolation_level": "REPEATABLE READ"} if is_postgresql else {}))
        self._single_reader = readers.execution_options(**{_ALONE: True})

    def transaction(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that may write: committed at the end of the block, rolled back if it raises.

        Await nothing but this connection inside it: with SQLite every other writer waits meanwhile, and
        opening a second one inside the first would wait for itself.

        Raises:
            Unavailable: the database is locked, full, or away, or undid the transaction for another's sake.
        """
        return _begun(self._writer)

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that reads one snapshot and cannot write.

        Raises:
            Unavailable: the database is away.
        """
        return _begun(self._snapshots)

    def statement(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a connection each of whose statements is, with PostgreSQL, a transaction of its own.

        Where one statement does, this spares two of three round trips. With SQLite it is `transaction`, whose BEGIN
        waits for other writers.

        Raises:
            Unavailable: as `transaction`.
        """
        return _begun(self._single_writer)

    def query(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """As `statement`, for one that reads; with SQLite, too."""
        return _begun(self._single_reader)

    async def check(self) -> None:
        """Raise Unavailable unless the database answers: a dependency of `mesh.service.serve`.

        A file of SQLite's is asked by a newcomer: who has it open is answered even when it is gone.
        """
        if self._file:
            await asyncio.to_thread(_require_answer, self._file)
        async with self.query() as connection:
            await connection.execute(text("SELECT 1"))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    """Open the database at a URL: `sqlite+aiosqlite:////<path>` or `postgresql+psycopg://<user>:<password>@<host>/<name>`.

    A missing SQLite file is made, readable by its owner only. PostgreSQL is first spoken to when it is needed.

    Raises:
        DatabaseNotSupported: the URL names something else.
    """
    async with _opened(url) as database:
        yield database


@asynccontextmanager
async def migrating(url: str) -> AsyncIterator[AsyncConnection]:
    """Open the transaction in which tables may change: whoever else wants to change them waits until it ends.

    Raises:
        DatabaseNotSupported: the URL names something that is no database of ours.
        Unavailable: the database is locked, full, or away.
    """
    # SQLite alters a table by making it anew; with foreign keys enforced, dropping the old one would delete the rows
    # that point to it.
    async with _opened(url, foreign_keys=False) as database, database.transaction() as connection:
        if connection.dialect.name == "postgresql":
            for name in POSTGRESQL_TIMEOUTS:  # a migration takes its time, and so does whoever waits for it
                await connection.execute(text(f"SET LOCAL {name} = 0"))
            await advisory_lock(connection, "migrations")
            # But it does not stand in line for a table: everybody else would stand behind it.
            await connection.execute(text(f"SET LOCAL lock_timeout = '{POSTGRESQL_TIMEOUTS['lock_timeout']}'"))
        yield connection
        if connection.dialect.name == "sqlite":
            broken = (await connection.execute(text("PRAGMA foreign_key_check"))).all()
            if broken:
                raise RuntimeError(f"the migration leaves {len(broken)} rows without the row they point to")


def require_supported(url: str) -> URL:
    """Return the parts of a database's URL.

    Raises:
        DatabaseNotSupported: it names neither a SQLite file nor a PostgreSQL database.
    """
    with suppress(ArgumentError):
        parsed = make_url(url)
        if parsed.drivername == "sqlite+aiosqlite" and parsed.database not in {None, "", ":memory:"}:
            return parsed
        if parsed.drivername in {"postgresql", "postgresql+psycopg"} and parsed.database:
            return parsed.set(drivername="postgresql+psycopg")
    # The rest of the URL may hold a password.
    scheme = url.partition(":")[0]
    raise DatabaseNotSupported(
        "A database is a SQLite file, sqlite+aiosqlite:////<path>, or PostgreSQL, "
        "postgresql+psycopg://<user>:<password>@<host>/<name>.",
        metadata={"scheme": scheme},
    )


def clock(later: timedelta = timedelta(0)) -> ColumnElement[datetime]:
    """Return, as an expression, the database's clock, or `later` than it says: the only judge of leases.

    Replicas' clocks differ.
    """
    return type_coerce(_Clock() + literal_column(str(later // _MICROSECOND)), Timestamp)


_ASK_CLOCK = select(clock())


async def now(connection: AsyncConnection) -> datetime:
    """Return what `clock` says, aware, UTC. Where an expression will do, it spares this round trip."""
    time: datetime = (await connection.execute(_ASK_CLOCK)).scalar_one()
    return time


def when_ended(connection: AsyncConnection, tell: Callable[[bool], None]) -> None:
    """Have `tell` called when this transaction has ended, with whether it has surely committed."""
    connection.info[_ENDED].append(tell)


def unless_there(connection: AsyncConnection, table: Table, *returned: Column[Any]) -> Insert:
    """Return an INSERT that leaves alone what has one of its unique keys, and says these columns of what went in."""
    return _unless_there(connection.dialect.name, table, *returned)


@lru_cache
def _unless_there(dialect: str, table: Table, *returned: Column[Any]) -> Insert:
    # Made once: making a statement costs as much as sending it.
    statement = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(table).on_conflict_do_nothing()
    return statement.returning(*returned) if returned else statement


async def insert_if_absent(connection: AsyncConnection, table: Table, values: Mapping[str, Any]) -> bool:
    """Insert a row; return False, changing nothing, when one of its unique keys is already there."""
    options = {"preserve_rowcount": True}
    result = await connection.execute(unless_there(connection, table), values, execution_options=options)
    return result.rowcount == 1


async def insert_absent(
    connection: AsyncConnection, table: Table, rows: Sequence[Mapping[str, Any]], key: Column[Any]
) -> set[Any]:
    """Insert those of `rows` whose unique keys are not there already; return their values of `key`."""
    if not rows:
        return set()
    return set((await connection.execute(unless_there(connection, table, key), rows)).scalars())


async def delete_some(connection: AsyncConnection, table: Table, old: ColumnElement[bool], *, at_most: int) -> bool:
    """Delete rows for which `old` holds, up to `at_most`; return whether more may be left.

    One statement that deletes everything would hold up all who write until it is done. Several replicas may delete at
    once: each row goes once.
    """
    key = tuple_(*table.primary_key.columns)
    some = select(*table.primary_key.columns).where(old).limit(at_most)
    return (await connection.execute(delete(table).where(key.in_(some)))).rowcount == at_most


async def advisory_lock(connection: AsyncConnection, name: str) -> None:
    """Hold off all others that lock `name`, until this transaction ends; for what no row stands for.

    Look only afterwards: what was seen before may be old.
    """
    if connection.dialect.name == "postgresql":  # SQLite's one writer holds off everybody anyway
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        await connection.execute(select(func.pg_advisory_xact_lock(number)))


@asynccontextmanager
async def _opened(url: str, *, foreign_keys: bool = True) -> AsyncIterator[Database]:
    parsed, file = require_supported(url), None
    if parsed.get_backend_name() == "postgresql":
        writer, readers = _postgresql_engine(parsed), _postgresql_engine(parsed, read_only=True)
    else:
        file = Path(str(parsed.database))
        file.parent.mkdir(parents=True, exist_ok=True)
        # Made here because SQLite would obey the umask; its -wal and -shm files take this file's mode.
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        await _write_ahead(file)
        writer = _sqlite_engine(url, pool_size=1, foreign_keys=foreign_keys)
        readers = _sqlite_engine(url, pool_size=READERS, query_only=True)
    try:
        yield Database(writer, readers, file)
    finally:
        await readers.dispose()
        await writer.dispose()


@asynccontextmanager
async def _begun(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    told: list[Callable[[bool], None]] = []
    committed = False
    try:
        async with engine.begin() as connection:
            connection.info[_ENDED] = told
            yield connection
        committed = True
    except NoFreeConnection as failure:
        raise Unavailable("The database is busy. Try again.", retry_after_seconds=1) from failure
    except DBAPIError as failure:
        if not _is_outage(failure):
            raise
        raise _unavailable(failure.orig) from failure
    finally:
        for tell in told:
            tell(committed)


def _require_answer(path: Path) -> None:
    address = f"{path.absolute().as_uri()}?mode=rw"  # never made anew: an empty one would answer, too
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=BUSY_TIMEOUT_MS / 1000)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_schema")
    except sqlite3.Error as failure:
        raise _unavailable(failure) from failure


def _require_uncut(connection: Any, _record: object, _proxy: object) -> None:
    """Have the pool make its connections anew when the server has cut this one: a restart costs its callers nothing.

    As SQLAlchemy's `pool_pre_ping`, without a question to the server: one that cuts a connection says so, and to an
    idle one it says nothing else.
    """
    wire = connection.driver_connection
    heard = poll()
    if not wire.closed:
        heard.register(wire.pgconn.socket, POLLIN)
    if wire.closed or heard.poll(0):
        raise InvalidatePoolError


def _unavailable(failure: BaseException | None) -> Unavailable:
    """Tell the log what the driver said, and the caller that it may try again."""
    log.warning("database unavailable", extra={"driver_error": str(failure)})
    return Unavailable("The database cannot answer now. Try again.", retry_after_seconds=1)


def _is_outage(failure: DBAPIError) -> bool:
    code = getattr(failure.orig, "sqlite_errorcode", None)
    if code is None:
        # PostgreSQL's OperationalError is what passes without a change of code (classes 08, 40, 53, 55, 57 and 58 of
        # its error codes): lost connections, deadlocks, timeouts, no room, no connection free.
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


def _sqlite_engine(url: str, *, pool_size: int, foreign_keys: bool = True, query_only: bool = False) -> AsyncEngine:
    engine = create_async_engine(
        url,
        # The driver's own BEGIN is deferred and comes late: two read-then-write transactions would then fail "locked"
        # however long they may wait. None leaves transactions to the statement below.
        connect_args={"isolation_level": None, "async_creator_fn": interruption.connect},
        hide_parameters=True,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=WRITER_WAIT_SECONDS,
    )

    def connected(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS if query_only else interruption.LOOK_MS}")
        cursor.execute("PRAGMA synchronous = FULL")  # WAL's usual NORMAL may lose commits when power fails
        cursor.execute(f"PRAGMA foreign_keys = {foreign_keys:d}")
        if query_only:
            cursor.execute("PRAGMA query_only = ON")
        cursor.close()

    event.listen(engine.sync_engine, "connect", connected)

    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get(_ALONE):
            return
        if query_only:
            connection.exec_driver_sql("BEGIN")
        else:
            interruption.begin_immediate(connection, BUSY_TIMEOUT_MS / 1000)

    event.listen(engine.sync_engine, "begin", begin)
    return engine


def _postgresql_engine(url: URL, *, read_only: bool = False) -> AsyncEngine:
    settings = dict(_POSTGRESQL_CONNECTION)
    if read_only:
        settings["options"] = f"{settings['options']} -c default_transaction_read_only=on"
    engine = create_async_engine(
        url,
        connect_args={name: value for name, value in settings.items() if name not in url.query},
        # What most of them do: another one for a transaction costs as much as a statement.
        isolation_level="AUTOCOMMIT" if read_only else "READ COMMITTED",
        pool_size=CONNECTIONS,
        pool_use_lifo=True,  # a warm connection costs PostgreSQL a tenth less than the one that rested longest
        max_overflow=0,
        pool_timeout=WRITER_WAIT_SECONDS,
        hide_parameters=True,  # of failed statements, in logs: among them are keys and hashes of passwords
    )
    event.listen(engine.sync_engine, "checkout", _require_uncut)
    if read_only:
        event.listen(engine.sync_engine, "connect", lambda connection, _record: connection.set_read_only(value=True))
    return engine
