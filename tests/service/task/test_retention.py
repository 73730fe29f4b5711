"""Tasks are kept for a while after their end, and then are gone, with all that was about them."""

import asyncio
from datetime import UTC, datetime, timedelta

from atelier.task.v1 import task_pb2 as pb
from sqlalchemy import func, insert, select, update

from mesh import idempotency
from services.task.domain import Terms
from services.task.tables import idempotency_table, metadata
from services.task.upkeep import CUT_AT_ONCE
from tests.databases import on_postgresql
from tests.service.task.conftest import OWNER, Replica, Start, Users, refused
from tests.service.task.test_batches import batch, resized

NOTHING, MONTH = timedelta(0), timedelta(days=30)


async def rows(replica: Replica) -> dict[str, int]:
    """Count what is stored about tasks."""
    async with replica.database.reading() as connection:
        return {
            name: (await connection.execute(select(func.count()).select_from(metadata.tables[name]))).scalar_one()
            for name in ("task", "task_event", "task_batch")
        }


async def cut(replica: Replica, kept: timedelta = NOTHING) -> int:
    """Cut once."""
    return await replica.tasks.cut(kept, 100, await replica.fence())


async def ended(replica: Replica) -> list[pb.Task]:
    """Return one task of each end."""
    done, broken = [(await replica.create(), await replica.claimed())[1] for _ in range(2)]
    await replica.complete(done)
    await replica.fail(broken)
    unwanted = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=unwanted.task_id))
    return [done, broken, unwanted]


async def test_what_ended_longer_ago_than_it_is_kept_is_gone_with_its_history(replica: Replica):
    for task in await ended(replica):
        assert (await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))).HasField("end_time")

    gone = await cut(replica)

    assert (gone, await rows(replica)) == (3, {"task": 0, "task_event": 0, "task_batch": 0})
    assert not (await replica.user().ListTasks(pb.ListTasksRequest())).tasks


async def test_what_has_not_ended_or_ended_lately_stays(replica: Replica):
    await ended(replica)
    await replica.create()
    await replica.claimed()
    queued = await replica.create()

    lately = await cut(replica, MONTH)
    await cut(replica)

    assert (lately, (await rows(replica))["task"]) == (0, 2)
    assert (await replica.user().GetTask(pb.GetTaskRequest(task_id=queued.task_id))).state == pb.Task.STATE_QUEUED


async def test_a_task_that_was_retried_stays(replica: Replica):
    task = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))
    await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))

    assert await cut(replica) == 0


@on_postgresql
async def test_a_task_that_is_retried_while_it_is_cut_stays(replica: Replica):
    task = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))

    async with replica.database.transaction() as connection:
        retried = update(metadata.tables["task"]).values(state="QUEUED", end_time=None)
        await connection.execute(retried)
        cutting = asyncio.create_task(cut(replica))
        await asyncio.wait([cutting], timeout=0.5)

    assert (await cutting, (await rows(replica))["task"]) == (0, 1)


async def test_a_batch_goes_with_the_last_of_its_tasks(replica: Replica):
    made = await replica.user().CreateTaskBatch(batch(resized(), resized()))
    first, second = await replica.claimed(), await replica.claimed()
    await replica.complete(first)

    await cut(replica)
    found = await replica.user().GetTaskBatch(pb.GetTaskBatchRequest(batch_id=made.batch_id))
    await replica.complete(second)
    await cut(replica)

    assert (found.fraction, found.task_count, found.state_counts) == (0.5, 2, pb.TaskBatch.StateCounts(running=1))
    refusal = await refused(replica.user().GetTaskBatch(pb.GetTaskBatchRequest(batch_id=made.batch_id)))
    assert refusal.reason == "TASK_BATCH_NOT_FOUND"


async def test_upkeep_cuts_step_by_step(start: Start, users: Users):
    users.limit = 3 * CUT_AT_ONCE
    replica = await start(Terms(kept=NOTHING))
    for _ in range(3):
        made = await replica.user().CreateTaskBatch(batch(*(resized() for _ in range(CUT_AT_ONCE))))
        await replica.user().CancelTaskBatch(pb.CancelTaskBatchRequest(batch_id=made.batch_id))
    fence = await replica.fence()
    step = await replica.tasks.cut(NOTHING, 10, fence)

    await replica.upkeep.forget(fence)

    assert (step, await rows(replica)) == (10, {"task": 0, "task_event": 0, "task_batch": 0})


async def test_a_replica_that_no_longer_keeps_house_cuts_nothing(start: Start):
    before, after = await start(), await start()
    await ended(before)
    replaced = await before.fence()
    await after.fence()

    for step in (before.tasks.cut(NOTHING, 100, replaced), before.tasks.forget(replaced)):
        assert (await refused(step)).reason == "LOCK_LOST"
    assert (await rows(after))["task"] == 3


async def test_forgetting_keeps_keys_that_may_be_repeated(replica: Replica):
    first = await replica.create(request_id="key")

    await replica.tasks.forget(await replica.fence())

    assert (await replica.create(request_id="key")).task_id == first.task_id
    assert first.user_id == OWNER


async def test_forgetting_drops_all_keys_that_nobody_repeats_any_more(replica: Replica):
    now, day, moment = datetime.now(UTC), timedelta(days=1), timedelta(minutes=1)
    key = {"caller": OWNER, "method": "CreateTask", "fingerprint": b"f", "resource_id": "tsk_1"}
    times = [now - day + moment, *[now - day - moment] * (idempotency.FORGOTTEN_AT_ONCE + 1)]
    async with replica.database.transaction() as connection:
        await connection.execute(
            insert(idempotency_table), [{**key, "key": str(n), "create_time": time} for n, time in enumerate(times)]
        )

    await replica.upkeep.forget(await replica.fence())

    async with replica.database.reading() as connection:
        assert (await connection.scalars(select(idempotency_table.c.key))).all() == ["0"]
