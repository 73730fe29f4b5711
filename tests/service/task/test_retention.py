"""Tasks are kept for a while after their end, and then are gone, with all that was about them."""

import asyncio
from datetime import timedelta

from atelier.task.v1 import task_pb2 as pb
from sqlalchemy import func, select

from services.task.domain import Terms
from services.task.tables import metadata
from services.task.upkeep import CUT_AT_ONCE, Upkeep
from tests.service.task.conftest import OWNER, Bus, Replica, Start, Users, refused
from tests.service.task.test_batches import batch, resized

NOTHING, MONTH = timedelta(0), timedelta(days=30)


async def rows(replica: Replica) -> dict[str, int]:
    """Count what is stored about tasks."""
    async with replica.database.reading() as connection:
        return {
            name: (await connection.execute(select(func.count()).select_from(metadata.tables[name]))).scalar_one()
            for name in ("task", "task_event", "task_batch")
        }


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

    cut = await replica.tasks.cut(NOTHING, 100)

    assert (cut, await rows(replica)) == (3, {"task": 0, "task_event": 0, "task_batch": 0})
    assert not (await replica.user().ListTasks(pb.ListTasksRequest())).tasks


async def test_what_has_not_ended_or_ended_lately_stays(replica: Replica):
    await ended(replica)
    await replica.create()
    await replica.claimed()
    queued = await replica.create()

    lately = await replica.tasks.cut(MONTH, 100)
    await replica.tasks.cut(NOTHING, 100)

    assert (lately, (await rows(replica))["task"]) == (0, 2)
    assert (await replica.user().GetTask(pb.GetTaskRequest(task_id=queued.task_id))).state == pb.Task.STATE_QUEUED


async def test_a_task_that_was_retried_stays(replica: Replica):
    task = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))
    await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))

    assert await replica.tasks.cut(NOTHING, 100) == 0


async def test_a_batch_goes_with_the_last_of_its_tasks(replica: Replica):
    made = await replica.user().CreateTaskBatch(batch(resized(), resized()))
    first, second = await replica.claimed(), await replica.claimed()
    await replica.complete(first)

    await replica.tasks.cut(NOTHING, 100)
    found = await replica.user().GetTaskBatch(pb.GetTaskBatchRequest(batch_id=made.batch_id))
    await replica.complete(second)
    await replica.tasks.cut(NOTHING, 100)

    assert (found.fraction, found.task_count, found.state_counts) == (0.5, 2, pb.TaskBatch.StateCounts(running=1))
    refusal = await refused(replica.user().GetTaskBatch(pb.GetTaskBatchRequest(batch_id=made.batch_id)))
    assert refusal.reason == "TASK_BATCH_NOT_FOUND"


async def test_upkeep_cuts_step_by_step_in_all_replicas_at_once(start: Start, users: Users):
    users.limit = 3 * CUT_AT_ONCE
    replicas = [await start(Terms(kept=NOTHING)) for _ in range(2)]
    for _ in range(3):
        made = await replicas[0].user().CreateTaskBatch(batch(*(resized() for _ in range(CUT_AT_ONCE))))
        await replicas[0].user().CancelTaskBatch(pb.CancelTaskBatchRequest(batch_id=made.batch_id))
    step = await replicas[0].tasks.cut(NOTHING, 10)

    await asyncio.gather(*(Upkeep(each.tasks, Bus(), lambda: Terms(kept=NOTHING)).cut() for each in replicas))

    assert (step, await rows(replicas[1])) == (10, {"task": 0, "task_event": 0, "task_batch": 0})


async def test_forgetting_keeps_keys_that_may_be_repeated(replica: Replica):
    first = await replica.create(request_id="key")

    await replica.tasks.forget()

    assert (await replica.create(request_id="key")).task_id == first.task_id
    assert first.user_id == OWNER
