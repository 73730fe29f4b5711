"""One replica keeps house, whatever happens to it and to Consul; a real Consul, with our ACLs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from mesh import database, discovery, lock, service
from mesh.database import Database
from scripts.local.layout import ROOT
from tests.consul import Consul, running
from tests.databases import are_waiting, on_postgresql, on_sqlite
from tests.eventually import eventually
from tests.service.mesh.housekeeper import WORK, done, fences, made, step, works

KEY = f"locks/storage/{WORK}"
LONG_SECONDS = 3 * (2 * lock.TTL_SECONDS + lock.RETRY_SECONDS)  # three times a session's end: machines are shared


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[Consul]:
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def sql(url: str) -> AsyncIterator[Database]:
    async with database.opened(url) as opened:
        await made(opened)
        yield opened


@asynccontextmanager
async def replica(consul: Consul, sql: Database, instance: str) -> AsyncIterator[None]:
    config = consul.config("storage", instance)
    async with service.working([works(config, sql, partial(step, sql, instance))], config):
        yield


@asynccontextmanager
async def process(consul: Consul, folder: Path, url: str, instance: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a replica of its own, for signals."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.service.mesh.housekeeper",
        str(folder), url, consul.url, str(consul.layout.secrets), instance,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
    )  # fmt: skip
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            started.kill()
        await started.wait()


async def newest(sql: Database, instance: str) -> int:
    """Return the fence of the last step if this replica took it; 0 otherwise."""
    found = await done(sql)
    return found[-1][1] if found and found[-1][0] == instance else 0


def require_one_at_a_time(found: list[tuple[str, int]]) -> None:
    """Check that nobody took a step after another had begun, and that each fence is one replica's."""
    of_steps = [fence for _, fence in found]
    assert of_steps == sorted(of_steps)
    assert len(set(found)) == len(set(of_steps))


async def test_a_fence_refuses_all_before_it_and_nobody_after(sql: Database) -> None:
    async with sql.transaction() as connection:
        first, second = [await lock.draw(connection, fences, WORK) for _ in range(2)]
        other = await lock.draw(connection, fences, "other")

    with pytest.raises(lock.LockLost) as refused:
        await step(sql, "storage-1", first)
    await step(sql, "storage-2", second)

    assert (first, second, other) == (1, 2, 1)
    assert refused.value.metadata == {"work": WORK}
    assert await done(sql) == [("storage-2", second)]


async def test_whoever_never_drew_a_fence_is_refused(sql: Database) -> None:
    with pytest.raises(lock.LockLost):
        await step(sql, "storage-1", 0)


@on_postgresql
async def test_nobody_takes_over_in_the_middle_of_a_step(sql: Database) -> None:
    async def elected() -> int:
        async with sql.transaction() as connection:
            return await lock.draw(connection, fences, WORK)

    first = await elected()
    async with sql.transaction() as connection:
        await lock.require(connection, fences, WORK, first)
        electing = asyncio.create_task(elected())
        await eventually(lambda: are_waiting(sql, 1))

    assert await electing > first


async def more_than(sql: Database, count: int) -> bool:
    return len(await done(sql)) > count


async def test_one_of_two_keeps_house_and_the_other_when_it_leaves(consul: Consul, sql: Database) -> None:
    async with replica(consul, sql, "storage-1"):
        first = await eventually(lambda: newest(sql, "storage-1"), within_seconds=LONG_SECONDS)
        async with replica(consul, sql, "storage-2"):
            steps_of_two_tries = int(2 * lock.RETRY_SECONDS / 0.1)
            await eventually(lambda: more_than(sql, steps_of_two_tries), within_seconds=LONG_SECONDS)
            alone = set(await done(sql))
    async with replica(consul, sql, "storage-2"):
        second = await eventually(lambda: newest(sql, "storage-2"), within_seconds=LONG_SECONDS)

    assert alone == {("storage-1", first)}
    assert second > first
    require_one_at_a_time(await done(sql))


@on_sqlite  # it waits for Consul; the database's part is tested on both above
async def test_a_replica_that_leaves_gives_its_lock_back(consul: Consul, sql: Database) -> None:
    async with replica(consul, sql, "storage-1"):
        await eventually(lambda: newest(sql, "storage-1"), within_seconds=LONG_SECONDS)

    async with discovery.connected(consul.config("storage", "storage-1")) as client:
        _, left = await client.kv.get(KEY)
    assert "Session" not in left  # the next need not wait until it has ended by itself


async def test_when_two_are_elected_only_the_later_passes(consul: Consul, sql: Database) -> None:
    async with replica(consul, sql, "storage-1"):
        first = await eventually(lambda: newest(sql, "storage-1"), within_seconds=LONG_SECONDS)
        async with (
            replica(consul, sql, "storage-2"),
            discovery.connected(consul.config("storage", "storage-1")) as client,
        ):
            await client.kv.delete(KEY)  # its session lasts, and so does its belief

            second = await eventually(lambda: newest(sql, "storage-2"), within_seconds=LONG_SECONDS)
            taken = len(await done(sql))
            await eventually(lambda: more_than(sql, taken + 20), within_seconds=LONG_SECONDS)

    assert second > first
    require_one_at_a_time(await done(sql))


@on_sqlite  # it waits for Consul, whose sessions take their time; the database's part is tested on both above
async def test_a_replica_that_was_stopped_for_too_long_is_refused(
    consul: Consul, sql: Database, tmp_path: Path, url: str
) -> None:
    stop = tmp_path / "stop"
    async with process(consul, tmp_path, url, "storage-1") as stopped:
        first = await eventually(lambda: newest(sql, "storage-1"), within_seconds=LONG_SECONDS)
        stop.touch()
        await eventually(lambda: psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED)
        async with replica(consul, sql, "storage-2"):
            second = await eventually(lambda: newest(sql, "storage-2"), within_seconds=LONG_SECONDS)

            taken = len(await done(sql))
            stopped.send_signal(signal.SIGCONT)
            await eventually(lambda: more_than(sql, taken + 50), within_seconds=LONG_SECONDS)
            after = set((await done(sql))[taken:])

    assert second > first
    assert after == {("storage-2", second)}
    require_one_at_a_time(await done(sql))


@on_sqlite  # it waits for Consul, whose sessions take their time; the database's part is tested on both above
async def test_without_consul_it_rests_and_a_wiped_consul_elects_anew(
    consul: Consul, sql: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mesh.lock")
    async with replica(consul, sql, "storage-1"), replica(consul, sql, "storage-2"):
        before = (await eventually(lambda: done(sql), within_seconds=LONG_SECONDS))[0][1]
        await consul.stop()
        stopped_at = time.monotonic()
        await eventually(lambda: "housekeeping ends here" in caplog.text, within_seconds=LONG_SECONDS)
        went_on_for_seconds = time.monotonic() - stopped_at
        taken = len(await done(sql))

        consul.wipe()
        await consul.start()
        await eventually(lambda: more_than(sql, taken + 10), within_seconds=LONG_SECONDS)

    after = (await done(sql))[taken:]
    assert went_on_for_seconds < 3 * lock.TTL_SECONDS
    assert min(fence for _, fence in after) > before
    require_one_at_a_time(await done(sql))
