"""R-16: a process that ends at any line, and others that work meanwhile, leave rows, bytes and quota in agreement."""

import asyncio
import dataclasses
import hashlib
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from sqlalchemy import func, insert, select, update

from mesh import database, ids, inbox, lock
from mesh.errors import Unavailable
from services.storage.domain import File, FileNotFound, NewFile, UploadUndone
from services.storage.keeping import Keeping
from services.storage.repository import EVENTS_KEPT, SqlFiles
from services.storage.signatures import detected_type
from services.storage.tables import file, inbox_table
from services.storage.upkeep import Upkeep
from tests.databases import on_postgresql

BODY = b"hello"
SHA256 = hashlib.sha256(BODY).hexdigest()


class Crash(BaseException):
    """The end of a process: nothing of ours catches it."""


class Crashing:
    """A port whose process ends before or after its nth call; `steps` is shared by all ports of a process."""

    def __init__(self, port, steps, at: int) -> None:
        self._port, self._steps, self._at = port, steps, at

    def __getattr__(self, name):
        inner = getattr(self._port, name)
        if not asyncio.iscoroutinefunction(inner):
            return inner

        async def call(*arguments):
            if next(self._steps) == self._at:
                raise Crash
            answer = await inner(*arguments)
            if next(self._steps) == self._at:
                raise Crash
            return answer

        return call


def crashing(world, at: int) -> Keeping:
    steps = count()
    ports = (world.files, world.blobs, world.quota, world.judge)
    return Keeping(*(Crashing(port, steps, at) for port in ports))


async def chunks():
    yield BODY


def upload(file_id: str = "", **result) -> NewFile:
    return NewFile(
        file_id=file_id or ids.new("fil"), user_id="usr_ann", name="a.txt", content_type=detected_type(BODY),
        size_bytes=len(BODY), sha256=SHA256, **result,
    )  # fmt: skip


async def keep(keeping: Keeping, world, new: NewFile, request_id: str = ""):
    async with world.blobs.received(chunks(), 100) as incoming:
        return await keeping.keep(new, incoming, request_id)


async def tidied(world) -> None:
    await world.age()
    await world.upkeep.tend()
    await world.upkeep.sweep(await world.elected())


async def in_agreement(world) -> bool:
    """Every row is ready, its bytes are there, it is charged; and there is nothing else."""
    rows = await world.rows()
    return world.contents() == set(rows.values()) and set(world.users.used) == set(rows)


# Four calls, each with a before and an after: begin, charge, keep, finish.
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("result", [{}, {"task_id": "tsk_1", "attempt": 1}])
async def test_an_upload_that_crashes_anywhere_is_tidied_up(world, at, result):
    with pytest.raises(Crash):
        await keep(crashing(world, at), world, upload(**result), "" if result else "k1")

    await tidied(world)

    assert await in_agreement(world)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("result", [{}, {"task_id": "tsk_1", "attempt": 1}])
async def test_an_upload_that_crashed_anywhere_is_finished_by_its_repetition(world, at, result):
    request_id = "" if result else "k1"
    with pytest.raises(Crash):
        await keep(crashing(world, at), world, upload(**result), request_id)

    kept = await keep(world.keeping, world, upload(**result), request_id)

    assert await world.rows() == {kept.file_id: SHA256}
    assert await in_agreement(world)


# Row away, then unused bytes away, then quota back and the debt paid: four calls.
@pytest.mark.parametrize("at", range(8))
async def test_a_delete_that_crashes_anywhere_is_tidied_up(world, at):
    kept = await keep(world.keeping, world, upload())
    with pytest.raises(Crash):
        await crashing(world, at).delete("usr_ann", kept.file_id, "req_1")

    await tidied(world)

    assert await in_agreement(world)


async def test_the_last_step_of_a_delete_is_known(world):
    kept = await keep(world.keeping, world, upload())

    await crashing(world, 8).delete("usr_ann", kept.file_id, "req_1")

    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_an_upload_given_up_by_another_replica_is_told_so_and_leaves_nothing(world):
    class Slow(Crashing):
        async def keep(self, incoming):
            await world.blobs.keep(incoming)
            await tidied(world)

    slow = Keeping(world.files, Slow(world.blobs, count(), -1), world.quota, world.judge)

    with pytest.raises(UploadUndone) as refusal:
        await keep(slow, world, upload())

    await tidied(world)
    assert (refusal.value.code, refusal.value.reason) == ("ABORTED", "UPLOAD_UNDONE")
    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


@pytest.mark.parametrize("is_old", [False, True])
async def test_an_upload_given_up_before_its_quota_was_charged_is_not_charged_for_ever(world, is_old):
    world.users.is_old = is_old

    class Slow(Crashing):
        async def charge(self, *arguments):
            [begun] = await world.files.stale(-1)
            await world.keeping.undo(begun)  # as another replica's upkeep
            try:
                await world.quota.charge(*arguments)
            finally:
                world.users.away = True

    slow = Keeping(world.files, world.blobs, Slow(world.quota, count(), -1), world.judge)

    with pytest.raises(UploadUndone):
        await keep(slow, world, upload())

    world.users.away = False
    await tidied(world)
    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


@pytest.mark.parametrize("away", [False, True])
async def test_an_upload_whose_charge_comes_after_it_was_given_up_is_not_charged(world, away):
    charges = []

    class Slow(Crashing):
        async def charge(self, *arguments):
            charges.append(arguments)  # it is under way
            world.users.away = away
            raise Unavailable("No answer in time.")

    slow = Keeping(world.files, world.blobs, Slow(world.quota, count(), -1), world.judge)
    with pytest.raises(Unavailable):
        await keep(slow, world, upload())
    world.users.away = False
    await tidied(world)

    with pytest.raises(UploadUndone):
        await world.quota.charge(*charges[0])

    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_bytes_under_removal_hold_an_upload_of_the_same_bytes_back(world):
    async with database.opened(world.url) as other_replica:
        async with world.files.unused(SHA256) as unused:
            begins = asyncio.create_task(SqlFiles(other_replica).begin(upload(), ""))
            begun, _ = await asyncio.wait({begins}, timeout=0.3)
            await world.blobs.remove(SHA256)
        await begins

    assert unused
    assert not begun


async def test_deletes_and_uploads_of_the_same_bytes_at_once_never_lose_a_live_file(world):
    async with database.opened(world.url) as sql:
        replica = Keeping(SqlFiles(sql), world.blobs, world.quota, world.judge)
        doomed = await keep(world.keeping, world, upload())
        for _ in range(30):
            _, kept = await asyncio.gather(
                world.keeping.delete("usr_ann", doomed.file_id, "req_1"), keep(replica, world, upload())
            )
            read = await world.blobs.read(SHA256, 0, len(BODY))
            assert b"".join([chunk async for chunk in read]) == BODY
            doomed = kept

    assert await in_agreement(world)


async def test_several_replicas_tidy_up_at_once(world):
    with pytest.raises(Crash):
        await keep(crashing(world, 4), world, upload())
    kept = await keep(world.keeping, world, upload())
    await world.age()
    async with database.opened(world.url) as sql:
        files = SqlFiles(sql)
        replica = Upkeep(files, world.blobs, Keeping(files, world.blobs, world.quota, world.judge))

        fence = await world.elected()

        await asyncio.gather(world.upkeep.tend(), replica.tend(), world.upkeep.sweep(fence), replica.sweep(fence))

    assert await world.rows() == {kept.file_id: SHA256}
    assert await in_agreement(world)


async def test_a_sweep_removes_bytes_that_no_row_has_and_no_others(world):
    kept = await keep(world.keeping, world, upload())
    async with world.blobs.received(_other(), 100) as incoming:
        await world.blobs.keep(incoming)
    await world.age()

    await world.upkeep.sweep(await world.elected())

    assert world.contents() == {kept.sha256}


async def test_a_sweep_forgets_all_events_that_are_past_their_time(world):
    old = {"consumer": "storage.events", "receive_time": datetime.now(UTC) - EVENTS_KEPT - timedelta(hours=1)}
    rows = [{**old, "event_id": f"evt_{number}"} for number in range(2 * inbox.FORGOTTEN_AT_ONCE + 1)]
    async with world.sql.transaction() as connection:
        await connection.execute(insert(inbox_table), rows)

    await world.upkeep.sweep(await world.elected())

    async with world.sql.reading() as connection:
        assert await connection.scalar(select(func.count()).select_from(inbox_table)) == 0


async def test_a_sweep_whose_replica_has_been_replaced_removes_nothing(world):
    async with world.blobs.received(_other(), 100) as incoming:
        await world.blobs.keep(incoming)
    await world.age()
    (orphan,) = world.contents()
    before = await world.elected()
    await world.elected()

    with pytest.raises(lock.LockLost):
        await world.upkeep.sweep(before)
    with pytest.raises(lock.LockLost):
        await world.keeping.remove_unused(orphan, before)

    assert world.contents() == {orphan}


async def _other():
    yield b"other"


async def test_a_sweep_leaves_young_bytes_to_the_upload_that_brings_them(world):
    async with world.blobs.received(_other(), 100) as incoming:
        await world.blobs.keep(incoming)

    await world.upkeep.sweep(await world.elected())

    assert len(world.contents()) == 1


@on_postgresql
async def test_an_upload_made_ready_while_it_is_undone_stays(world):
    begun = await world.files.begin(upload(), "")

    async with world.sql.transaction() as connection:
        await connection.execute(update(file).values(ready=True))  # as finishing it does
        undo = asyncio.create_task(world.files.undo(begun))
        await asyncio.wait([undo], timeout=0.5)

    assert await undo is False
    assert (await world.files.get("usr_ann", begun.file_id)).ready


async def test_writes_of_one_attempt_that_begin_at_once_are_one_file(world):
    begun = await asyncio.gather(*(world.files.begin(upload(task_id="tsk_1", attempt=1), "") for _ in range(10)))

    assert len({each.file_id for each in begun}) == 1


async def test_writes_of_one_attempt_with_other_bytes_take_each_other_s_place(world):
    def other(number: int) -> NewFile:
        return dataclasses.replace(upload(task_id="tsk_1", attempt=1), sha256=f"{number:064d}")

    begun = await asyncio.gather(*(world.files.begin(other(number), "") for number in range(10)))

    assert len(begun) == 10
    (left,) = await world.files.results("tsk_1", 1)
    assert left in begun


async def test_a_write_that_broke_off_does_not_give_its_bytes_to_the_next_one(world):
    """A repeated attempt that encodes otherwise has its own bytes, not a row of bytes that never came."""
    broken = dataclasses.replace(upload(task_id="tsk_1", attempt=1), sha256="0" * 64)
    await world.files.begin(broken, "")

    kept = await keep(world.keeping, world, upload(task_id="tsk_1", attempt=1))
    await world.upkeep.tend()

    assert kept.sha256 == SHA256
    assert await in_agreement(world)


async def test_a_result_that_is_confirmed_while_it_is_refused_stays(world):
    kept = await keep(world.keeping, world, upload(task_id="tsk_1", attempt=1))

    await world.files.confirm("tsk_1", kept.file_id)
    refused = await world.files.refuse(kept.file_id)

    assert not refused
    assert await in_agreement(world)


async def test_of_many_who_delete_a_file_at_once_one_does(world):
    kept = await keep(world.keeping, world, upload())

    outcomes = await asyncio.gather(
        *(world.files.delete("usr_ann", kept.file_id, f"req_{n}") for n in range(10)), return_exceptions=True
    )

    assert [type(outcome) for outcome in outcomes if not isinstance(outcome, FileNotFound)] == [File]
