"""What becomes of a statement, its transaction and its connection when the caller is cancelled or out of time."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from mesh import database
from mesh.database import Database
from tests.databases import on_sqlite
from tests.eventually import eventually

pytestmark = on_sqlite  # PostgreSQL's driver has a server that ends statements

# Ten seconds of a processor; what it makes of them is one row.
SLOW = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000000) SELECT count(*) FROM n"
SLOW_READ = text(SLOW)
SLOW_WRITE = text(f"INSERT INTO noted SELECT 1, ({SLOW})")
AT_ONCE_SECONDS = 3.0  # it takes milliseconds; machines are shared


@pytest.fixture
async def opened(url: str) -> AsyncIterator[Database]:
    async with database.opened(url) as opened:
        async with opened.transaction() as connection:
            await connection.execute(text("CREATE TABLE noted (id INTEGER PRIMARY KEY, half INTEGER)"))
        yield opened


async def read(opened: Database, statement: str = "SELECT count(*) FROM noted") -> int:
    async with opened.reading() as connection:
        return await connection.scalar(text(statement))


async def read_slowly(opened: Database) -> None:
    await read(opened, SLOW)


async def write_slowly(opened: Database) -> None:
    async with opened.transaction() as connection:
        await connection.execute(text("INSERT INTO noted VALUES (7, 0)"))
        await connection.execute(SLOW_WRITE)


async def write(opened: Database, number: int = 1) -> None:
    async with opened.transaction() as connection:
        await connection.execute(text(f"INSERT INTO noted VALUES ({2 * number}, 0)"))
        await connection.execute(text(f"INSERT INTO noted VALUES ({2 * number + 1}, 1)"))


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if "_connection_worker_thread" in each.name]


async def seconds(work: Awaitable[object]) -> float:
    began = time.monotonic()
    await asyncio.gather(work, return_exceptions=True)
    return time.monotonic() - began


def lock_is_free(folder: Path) -> bool:
    with closing(sqlite3.connect(folder / "test.db", timeout=0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    return True


@pytest.mark.parametrize("work", [read_slowly, write_slowly])
async def test_a_statement_ends_when_its_caller_is_cancelled(opened: Database, tmp_path: Path, work) -> None:
    running = asyncio.create_task(work(opened))
    await asyncio.sleep(0.2)  # the time it has worked, of the many seconds that it would

    running.cancel()

    assert await seconds(running) < AT_ONCE_SECONDS
    assert running.cancelled()
    assert lock_is_free(tmp_path)
    assert await seconds(write(opened)) < AT_ONCE_SECONDS
    assert await read(opened) == 2


@pytest.mark.parametrize("work", [read_slowly, write_slowly])
async def test_a_statement_ends_with_its_deadline(opened: Database, tmp_path: Path, work) -> None:
    async def within_its_deadline() -> None:
        async with asyncio.timeout(0.2):
            await work(opened)

    running = asyncio.create_task(within_its_deadline())

    assert await seconds(running) < 0.2 + AT_ONCE_SECONDS
    assert isinstance(running.exception(), TimeoutError)
    assert lock_is_free(tmp_path)
    assert await seconds(write(opened)) < AT_ONCE_SECONDS


async def test_a_writer_that_waits_for_another_process_ends_when_it_is_cancelled(
    opened: Database, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(write(opened))
        await asyncio.sleep(0.2)

        waiting.cancel()

        assert await seconds(waiting) < AT_ONCE_SECONDS
    assert await seconds(write(opened)) < AT_ONCE_SECONDS


async def test_every_reader_is_there_again_after_as_many_were_cancelled(opened: Database) -> None:
    reading = [asyncio.create_task(read_slowly(opened)) for _ in range(2 * database.READERS)]
    await asyncio.sleep(0.2)
    for each in reading:
        each.cancel()
    await asyncio.gather(*reading, return_exceptions=True)

    assert await seconds(asyncio.gather(*(read(opened) for _ in range(2 * database.READERS)))) < AT_ONCE_SECONDS


async def test_a_second_cancellation_leaves_no_more_behind_than_the_first(opened: Database, tmp_path: Path) -> None:
    await read(opened)  # its connection stays: a file's last one, when it goes, has the file for itself for a moment
    running = asyncio.create_task(write_slowly(opened))
    await asyncio.sleep(0.2)

    while not running.done():
        running.cancel()
        await asyncio.sleep(0)

    assert lock_is_free(tmp_path)
    assert await seconds(write(opened)) < AT_ONCE_SECONDS
    await eventually(lambda: len(threads()) <= 1 + database.READERS)


async def test_a_cancelled_writer_has_written_all_or_nothing_when_it_ends_and_nothing_comes_after(
    opened: Database, tmp_path: Path
) -> None:
    # By what a whole one takes, commits are hit before, in the midst and after.
    began = time.monotonic()
    for number in range(20):
        await write(opened, 1_000 + number)
    usual_seconds = (time.monotonic() - began) / 20
    chance, ends = random.Random(3), set()

    with closing(sqlite3.connect(tmp_path / "test.db", isolation_level=None)) as other:
        for number in range(200):
            writing = asyncio.create_task(write(opened, number))
            await asyncio.sleep(usual_seconds * chance.uniform(0, 1.2))
            writing.cancel()
            await asyncio.wait([writing])
            found = [other.execute("SELECT count(*) FROM noted WHERE id < 1000").fetchone()[0]]
            await asyncio.sleep(usual_seconds / 4)
            found.append(other.execute("SELECT count(*) FROM noted WHERE id < 1000").fetchone()[0])

            assert found[0] == found[1] in (0, 2)
            assert writing.cancelled() or found[0] == 2
            ends.add((writing.cancelled(), found[0]))
            other.execute("DELETE FROM noted WHERE id < 1000")

    assert (True, 0) in ends


async def test_a_storm_of_cancelled_calls_leaves_no_transaction_open_and_no_connection_behind(
    opened: Database, tmp_path: Path
) -> None:
    chance = random.Random(5)
    works = [lambda: read_slowly(opened), lambda: write_slowly(opened), lambda: read(opened)]
    storm = []
    for number in range(400):
        work = chance.choice([*works, lambda number=number: write(opened, 10 + number)])
        storm.append(asyncio.create_task(work()))
        await asyncio.sleep(chance.uniform(0, 0.002))
        chance.choice(storm).cancel()
    for each in storm:
        each.cancel()
    ends = await asyncio.gather(*storm, return_exceptions=True)

    assert {type(end) for end in ends} <= {asyncio.CancelledError, type(None), int}
    assert lock_is_free(tmp_path)
    assert await read(opened, "SELECT count(*) FROM noted WHERE id = 7") == 0
    assert await read(opened, "SELECT sum(half) * 2 - count(*) FROM noted WHERE id > 7") in (0, None)
    assert await seconds(asyncio.gather(*(read(opened) for _ in range(2 * database.READERS)))) < AT_ONCE_SECONDS
    assert await seconds(write(opened)) < AT_ONCE_SECONDS
    await eventually(lambda: len(threads()) <= 1 + database.READERS)
