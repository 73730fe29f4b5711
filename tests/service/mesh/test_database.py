from __future__ import annotations

import asyncio
import random
import sqlite3
import stat
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError

from mesh import database, idempotency, inbox
from mesh.database import Database, Timestamp
from mesh.errors import Unavailable
from mesh.idempotency import IdempotencyKeyReused
from tests.databases import are_waiting, on_postgresql, on_sqlite
from tests.eventually import eventually
from tests.postgres import PASSWORD, Server

metadata = MetaData()
counter = Table("counter", metadata, Column("name", String, primary_key=True), Column("value", Integer))
pair = Table("pair", metadata, Column("id", Integer, primary_key=True), Column("left", Integer))
child = Table("child", metadata, Column("name", String, ForeignKey("counter.name"), primary_key=True))
moment = Table("moment", metadata, Column("time", Timestamp))
inbox_table = inbox.table(metadata)
idempotency_table = idempotency.table(metadata)

ADD_IN_TURNS = """
import asyncio, sys
from sqlalchemy import select, update
from mesh import database
from tests.service.mesh.test_database import counter

async def main():
    async with database.opened(sys.argv[1]) as opened:
        for _ in range(100):
            async with opened.transaction() as connection:
                value = await connection.scalar(select(counter.c.value).with_for_update())
                await connection.execute(update(counter).values(value=value + 1))

asyncio.run(main())
"""

OPEN_NEW_FILES_ON_TIME = """
import asyncio, sys, time
from mesh import database

async def main(folder, begin):
    for number in range(50):
        time.sleep(max(0, begin + number * 0.02 - time.time()))
        async with database.opened(f"sqlite+aiosqlite:///{folder}/{number}.db") as opened:
            await opened.check()

asyncio.run(main(sys.argv[1], float(sys.argv[2])))
"""


@pytest.fixture
async def opened(url: str) -> AsyncIterator[Database]:
    async with database.opened(url) as opened:
        async with opened.transaction() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.execute(insert(counter).values(name="only", value=0))
        yield opened


async def count(opened: Database, table: Table) -> int:
    async with opened.reading() as connection:
        return await connection.scalar(select(func.count()).select_from(table)) or 0


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("test.db*")}


@on_sqlite
async def test_a_database_that_is_away_does_not_answer_though_connections_are_open(
    opened: Database, url: str, tmp_path: Path
) -> None:
    path, aside = Path(str(make_url(url).database)), tmp_path / "aside"
    await opened.check()

    path.rename(aside)
    with pytest.raises(Unavailable):
        await opened.check()
    made_anew = path.exists()
    aside.rename(path)

    await opened.check()
    assert not made_anew


async def test_two_processes_that_read_then_write_never_fail_nor_lose_a_write(opened: Database, url: str) -> None:
    processes = [await asyncio.create_subprocess_exec(sys.executable, "-c", ADD_IN_TURNS, url) for _ in range(2)]
    statuses = [await process.wait() for process in processes]

    async with opened.reading() as connection:
        value = await connection.scalar(select(counter.c.value))
    assert (statuses, value) == ([0, 0], 200)


async def test_tasks_of_one_process_take_turns_at_writing(opened: Database) -> None:
    async def add() -> None:
        async with opened.transaction() as connection:
            value = await connection.scalar(select(counter.c.value).with_for_update())
            await asyncio.sleep(0)
            await connection.execute(update(counter).values(value=(value or 0) + 1))

    await asyncio.gather(*(add() for _ in range(50)))

    async with opened.reading() as connection:
        assert await connection.scalar(select(counter.c.value)) == 50


async def test_a_storm_of_cancelled_callers_leaves_no_lock_no_half_and_no_lost_connection(
    opened: Database, url: str
) -> None:
    async def write_pair(number: int) -> None:
        async with opened.transaction() as connection:
            await connection.execute(insert(pair).values(id=2 * number, left=1))
            await connection.execute(insert(pair).values(id=2 * number + 1, left=0))

    async def read() -> None:
        await count(opened, pair)

    chance = random.Random(2)
    storm = [asyncio.create_task(write_pair(number)) for number in range(200)]
    storm += [asyncio.create_task(read()) for _ in range(200)]
    chance.shuffle(storm)
    for task in storm:
        await asyncio.sleep(chance.uniform(0, 0.002))
        if chance.random() < 0.8:
            task.cancel()
    outcomes = await asyncio.gather(*storm, return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError, type(None)}
    async with opened.reading() as connection:
        lefts = await connection.scalar(select(func.sum(pair.c.left)))
    assert await count(opened, pair) == 2 * (lefts or 0)
    async with asyncio.timeout(15), database.opened(url) as other, other.transaction() as connection:
        await connection.execute(update(pair).values(left=0))  # nobody holds a lock
    async with asyncio.timeout(15):  # every connection can be had, and once more
        await asyncio.gather(*(read() for _ in range(3 * database.CONNECTIONS)))
        await asyncio.gather(*(write_pair(1_000 + number) for number in range(3 * database.CONNECTIONS)))


@on_sqlite
async def test_a_locked_database_is_unavailable_in_our_own_words(opened: Database, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(Unavailable) as refusal:
        async with opened.transaction():
            pass

    other.close()
    assert "locked" not in refusal.value.message
    assert refusal.value.retry_after_seconds == 1


@on_sqlite
async def test_a_full_disk_is_unavailable_and_passes(opened: Database) -> None:
    async def fill() -> None:
        async with opened.transaction() as connection:
            await connection.execute(text("INSERT INTO counter VALUES ('big', zeroblob(1000000))"))

    async with opened.transaction() as connection:
        # What SQLite says is the same as for a disk without room: SQLITE_FULL.
        await connection.execute(text("PRAGMA max_page_count = 20"))
    with pytest.raises(Unavailable):
        await fill()
    async with opened.transaction() as connection:
        await connection.execute(text("PRAGMA max_page_count = 100000"))

    await fill()


async def test_a_wrong_statement_is_a_bug_and_not_an_outage(opened: Database) -> None:
    with pytest.raises(DBAPIError):
        async with opened.transaction() as connection:
            await connection.execute(text("SELECT * FROM missing"))


async def test_a_reader_cannot_write(opened: Database) -> None:
    with pytest.raises(DBAPIError):
        async with opened.reading() as connection:
            await connection.execute(insert(counter).values(name="other", value=1))


async def test_a_reader_sees_one_snapshot_while_others_write(opened: Database) -> None:
    async with opened.reading() as reader:
        before = await reader.scalar(select(counter.c.value))
        async with opened.transaction() as writer:
            await writer.execute(update(counter).values(value=7))
        after = await reader.scalar(select(counter.c.value))

    assert (before, after) == (0, 0)


async def test_a_failed_block_changes_nothing(opened: Database) -> None:
    async def fail_late() -> None:
        async with opened.transaction() as connection:
            await connection.execute(insert(pair).values(id=1, left=1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_late()

    assert await count(opened, pair) == 0


async def test_foreign_keys_hold(opened: Database) -> None:
    with pytest.raises(IntegrityError):
        async with opened.transaction() as connection:
            await connection.execute(insert(child).values(name="nobody"))


@on_sqlite
async def test_only_the_owner_can_read_the_files(opened: Database, tmp_path: Path) -> None:
    await count(opened, counter)

    assert modes(tmp_path) == {0o600}


@on_sqlite
async def test_commits_survive_a_loss_of_power(opened: Database) -> None:
    async with opened.transaction() as connection:
        settings = [await connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous")]

    assert settings == ["wal", 2]  # 2 is FULL


async def test_a_time_comes_back_exactly_and_in_utc(opened: Database) -> None:
    time = datetime(2026, 2, 3, 4, 5, 6, 789_123, tzinfo=timezone(timedelta(hours=2)))

    async with opened.transaction() as connection:
        await connection.execute(insert(moment).values(time=time))
        kept = await connection.scalar(select(moment.c.time))

    assert kept == time
    assert kept.tzinfo is UTC


async def test_the_databases_clock_is_the_machines(opened: Database) -> None:
    async with opened.reading() as connection:
        time = await database.now(connection)

    assert abs(time - datetime.now(UTC)) < timedelta(seconds=5)


async def test_an_event_is_new_once_for_each_consumer(opened: Database) -> None:
    async with opened.transaction() as connection:
        answers = [
            await inbox.first_time(connection, inbox_table, consumer, event_ids)
            for consumer, event_ids in (("quota", ["b", "a", "b"]), ("quota", ["c", "a"]), ("mail", ["a"]))
        ]

    assert answers == [{"a", "b"}, {"c"}, {"a"}]


async def test_concurrent_creates_with_one_key_get_one_id(opened: Database) -> None:
    async def adopt(key: str, new_id: str) -> tuple[str, bool]:
        async with opened.transaction() as connection:
            return await idempotency.adopt(
                connection, idempotency_table, caller="usr_1", method="m", key=key, fingerprint=b"f", new_id=new_id
            )

    for key in ("connections are made", "connections are there"):
        answers = await asyncio.gather(*(adopt(key, f"tsk_{number}") for number in range(50)))

        assert len({adopted for adopted, _ in answers}) == 1
        assert sum(fresh for _, fresh in answers) == 1


@on_postgresql
async def test_a_key_stands_for_its_resource_until_whoever_repeats_it_has_looked(opened: Database) -> None:
    key = {"caller": "usr_1", "method": "m", "key": "k", "fingerprint": b"f"}
    async with opened.transaction() as connection:
        await idempotency.adopt(connection, idempotency_table, new_id="tsk_1", **key)

    async def delete_with_its_resource() -> None:
        async with opened.transaction() as connection:
            await connection.execute(delete(idempotency_table))

    async with opened.transaction() as connection:
        await idempotency.adopt(connection, idempotency_table, new_id="tsk_2", **key)
        deleting = asyncio.create_task(delete_with_its_resource())
        await eventually(lambda: are_waiting(opened, 1))

    await deleting


async def test_a_key_used_for_another_request_is_refused(opened: Database) -> None:
    key = {"caller": "usr_1", "method": "m", "key": "k", "new_id": "tsk_1"}
    async with opened.transaction() as connection:
        await idempotency.adopt(connection, idempotency_table, fingerprint=b"a small one", **key)

    with pytest.raises(IdempotencyKeyReused) as refusal:
        async with opened.transaction() as connection:
            await idempotency.adopt(connection, idempotency_table, fingerprint=b"a big one", **key)

    assert (refusal.value.reason, refusal.value.metadata) == ("IDEMPOTENCY_KEY_REUSED", {"request_id": "k"})


async def test_requests_that_are_adopted_together_each_get_what_they_would_alone(opened: Database) -> None:
    def request(key: str, new_id: str, fingerprint: bytes = b"f") -> idempotency.Request:
        return idempotency.Request("usr_1", "m", key, fingerprint, new_id)

    async def adopt(*requests: idempotency.Request) -> list[object]:
        async with opened.transaction() as connection:
            answers = await idempotency.adopt_together(connection, idempotency_table, requests)
        return [each.reason if isinstance(each, IdempotencyKeyReused) else each for each in answers]

    before = await adopt(request("old", "tsk_0"))
    together = await adopt(
        request("new", "tsk_1"),
        request("old", "tsk_2"),
        request("new", "tsk_3"),
        request("new", "tsk_4", b"another"),
        request("other", "tsk_5"),
    )

    assert before == [("tsk_0", True)]
    assert together == [
        ("tsk_1", True), ("tsk_0", False), ("tsk_1", False), "IDEMPOTENCY_KEY_REUSED", ("tsk_5", True),
    ]  # fmt: skip


async def test_a_forgotten_key_is_free_again(opened: Database) -> None:
    key = {"caller": "usr_1", "method": "m", "key": "k", "fingerprint": b"f"}
    async with opened.transaction() as connection:
        await idempotency.adopt(connection, idempotency_table, new_id="tsk_1", **key)
        await idempotency.forget(connection, idempotency_table, older_than=timedelta(seconds=-1))

        answer = await idempotency.adopt(connection, idempotency_table, new_id="tsk_2", **key)

    assert answer == ("tsk_2", True)


async def test_processes_that_open_a_new_database_at_once_all_do(tmp_path: Path) -> None:
    begin = str(time.time() + 2)  # when all have imported what they need
    arguments = (sys.executable, "-c", OPEN_NEW_FILES_ON_TIME, str(tmp_path), begin)

    processes = [await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE) for _ in range(3)]
    complaints = [(await process.communicate())[1].decode() for process in processes]

    assert complaints == ["", "", ""]


async def test_old_rows_are_deleted_some_at_a_time(opened: Database) -> None:
    async with opened.transaction() as connection:
        await connection.execute(insert(pair), [{"id": number, "left": number % 2} for number in range(10)])

    more = []
    for _ in range(3):
        async with opened.transaction() as connection:
            more.append(await database.delete_some(connection, pair, pair.c.left == 1, at_most=2))

    async with opened.reading() as connection:
        left = list(await connection.scalars(select(pair.c.id)))
    assert (more, left) == ([True, True, False], [0, 2, 4, 6, 8])


async def test_a_lock_holds_off_others_of_its_name_until_the_transaction_ends(opened: Database) -> None:
    order = []

    async def take(name: str) -> None:
        async with opened.transaction() as connection:
            await database.advisory_lock(connection, name)
            order.append(name)

    async with opened.transaction() as connection:
        await database.advisory_lock(connection, "one")
        other = asyncio.create_task(take("one"))
        await asyncio.wait([other], timeout=0.3)
        order.append("first")
    await other

    assert order == ["first", "one"]


@on_postgresql
async def test_a_lock_leaves_other_names_alone(opened: Database) -> None:
    async with opened.transaction() as connection, opened.transaction() as another:
        await database.advisory_lock(connection, "one")
        await database.advisory_lock(another, "other")


@on_postgresql
async def test_writers_do_not_wait_for_each_other(opened: Database) -> None:
    async with opened.transaction() as connection, opened.transaction() as another:
        await connection.execute(insert(pair).values(id=1, left=1))
        await another.execute(insert(pair).values(id=2, left=1))


@on_postgresql
async def test_a_cancelled_caller_s_statement_ends_on_the_server(opened: Database, postgresql: Server) -> None:
    running = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT pg_sleep%'"

    async def sleep() -> None:
        async with opened.transaction() as connection:
            await connection.execute(text("SELECT pg_sleep(25)"))

    caller = asyncio.create_task(sleep())
    await eventually(lambda: postgresql.execute(running))
    caller.cancel()
    await asyncio.wait([caller])

    await eventually(lambda: not postgresql.execute(running))
    assert caller.cancelled()


@on_postgresql
async def test_connections_that_the_server_cut_cost_nobody_a_call(opened: Database, postgresql: Server) -> None:
    readers = (count(opened, pair) for _ in range(database.CONNECTIONS))
    await asyncio.gather(*readers)

    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'tester'"
    await eventually(lambda: not postgresql.execute(cut))

    assert await asyncio.gather(*(count(opened, pair) for _ in range(2 * database.CONNECTIONS))) == [0] * 10


@on_postgresql
async def test_a_server_that_is_killed_is_unavailable_until_it_is_back(opened: Database, postgresql: Server) -> None:
    async with opened.transaction() as connection:
        await connection.execute(insert(pair).values(id=1, left=1))

    async def write_on() -> None:
        for number in range(2, 10_000):
            async with opened.transaction() as connection:
                await connection.execute(insert(pair).values(id=number, left=1))

    writer = asyncio.create_task(write_on())
    await asyncio.wait([writer], timeout=0.2)
    postgresql.kill()
    with pytest.raises(Unavailable) as broken:
        await writer
    with pytest.raises(Unavailable) as refusal:
        await opened.check()
    postgresql.start()

    await opened.check()
    assert await count(opened, pair) >= 1
    assert broken.value.message == refusal.value.message == "The database cannot answer now. Try again."


# What the server says of a full disk, a failing one, a deadlock, a shutdown, and of itself when it has too many guests.
@on_postgresql
@pytest.mark.parametrize("code", ["53100", "58030", "40P01", "40001", "57P01", "53300"])
async def test_what_passes_by_itself_is_unavailable_in_our_own_words(opened: Database, code: str) -> None:
    with pytest.raises(Unavailable) as refusal:
        async with opened.transaction() as connection:
            await connection.execute(
                text(f"DO $$ BEGIN RAISE EXCEPTION 'the driver says' USING ERRCODE = '{code}'; END $$")
            )

    assert "driver" not in refusal.value.message
    assert refusal.value.retry_after_seconds == 1


@on_postgresql
async def test_a_server_with_no_connection_free_is_unavailable(opened: Database, url: str, postgresql: Server) -> None:
    async with opened.transaction():
        postgresql.execute(f"ALTER DATABASE {url.rpartition('/')[2]} CONNECTION LIMIT 1")

        with pytest.raises(Unavailable):
            await opened.check()


@on_postgresql
async def test_whoever_waits_for_a_row_gives_up_when_the_url_says_so(opened: Database, url: str) -> None:
    async def take(database: Database) -> None:
        async with database.transaction() as connection:
            await connection.execute(update(counter).values(value=2))

    impatient = database.opened(f"{url}?options=-c%20lock_timeout%3D100ms")
    async with impatient as other, opened.transaction() as connection:
        await connection.execute(update(counter).values(value=1))

        with pytest.raises(Unavailable):
            await take(other)
        async with other.reading() as another:
            assert await another.scalar(text("SHOW lock_timeout")) == "100ms"


@on_postgresql
async def test_no_transaction_lasts_for_ever_and_no_statement_is_compiled(opened: Database) -> None:
    async with opened.transaction() as connection:
        settings = {name: await connection.scalar(text(f"SHOW {name}")) for name in database.POSTGRESQL_SETTINGS}

    assert settings == database.POSTGRESQL_SETTINGS


@on_postgresql
async def test_a_password_stands_in_no_error_and_no_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with database.opened(url.replace(PASSWORD, "wr0ng")) as refused:
        with pytest.raises(Unavailable) as refusal:
            await refused.check()

    logged = str([record.__dict__ for record in caplog.records])
    assert "authentication failed" in logged
    assert "wr0ng" not in f"{refusal.value!r}{refusal.value.metadata}{refusal.value.__cause__!r}{logged}{refused}"


@on_postgresql
async def test_a_failed_statement_is_told_without_its_values(opened: Database) -> None:
    with pytest.raises(DBAPIError) as failure:
        async with opened.transaction() as connection:
            await connection.execute(text("SELECT * FROM missing WHERE hash = :hash"), {"hash": "5ecret"})

    assert "5ecret" not in str(failure.value)


async def test_a_single_statement_is_committed_by_itself_and_its_connection_is_a_transactions_again(
    opened: Database,
) -> None:
    async with opened.statement() as connection:
        await connection.execute(update(counter).values(value=1))
    with suppress(ZeroDivisionError):
        async with opened.transaction() as connection:
            await connection.execute(update(counter).values(value=2))
            raise ZeroDivisionError

    async with opened.query() as connection:
        assert await connection.scalar(select(counter.c.value)) == 1


async def test_a_query_cannot_write(opened: Database) -> None:
    with pytest.raises(DBAPIError):
        async with opened.query() as connection:
            await connection.execute(update(counter).values(value=1))


async def test_whoever_waits_for_a_transactions_end_hears_whether_it_committed(opened: Database) -> None:
    heard: list[bool] = []
    async with opened.transaction() as connection:
        database.when_ended(connection, heard.append)
        assert not heard
    with suppress(ZeroDivisionError):
        async with opened.transaction() as connection:
            database.when_ended(connection, heard.append)
            raise ZeroDivisionError
    async with opened.transaction():
        pass

    assert heard == [True, False]


async def test_the_clock_is_the_same_in_a_statement_and_asked_for(opened: Database) -> None:
    async with opened.transaction() as connection:
        await connection.execute(insert(moment).values(time=database.clock(timedelta(hours=1))))
        later = await database.now(connection) + timedelta(hours=1)
        written = await connection.scalar(select(moment.c.time))
        found = await connection.scalar(select(func.count()).where(moment.c.time > database.clock()))

    assert written is not None
    assert timedelta(0) <= later - written < timedelta(seconds=5)
    assert found == 1
