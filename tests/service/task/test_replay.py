"""ReplayTasks: the events are the whole truth about tasks; their table can be made of them again."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from atelier.media.v1 import media_pb2
from atelier.task.v1 import task_pb2 as pb
from atelier.task.v1.task_pb2_grpc import TaskServiceStub
from sqlalchemy import delete, null, select, update

from services.task import handlers
from services.task.domain import Terms
from services.task.tables import task as task_table
from services.task.tables import task_event as event_table
from tests.eventually import eventually
from tests.service.task.conftest import OWNER, PHOTO, STRANGER, Replica, Start, refused
from tests.service.task.test_working_on_tasks import renewal

PASSING = {"progress_fraction", "progress_stage", "lease_time", "update_time"}  # of a running task
TWICE = Terms(attempts=2, backoff=timedelta(milliseconds=1))


@pytest.fixture
async def replica(start: Start) -> Replica:
    return await start(TWICE)


async def replayed(replica: Replica, *, rebuild: bool = False) -> dict[str, list[str]]:
    """Return what differs, by task."""
    stub = TaskServiceStub(replica.server.channel(user="usr_admin", role="ROLE_ADMIN"))
    request, different = pb.ReplayTasksRequest(rebuild=rebuild), {}
    while True:
        answer = await stub.ReplayTasks(request)
        different |= {each.task_id: list(each.fields) for each in answer.discrepancies}
        if not answer.next_page_token:
            return different
        request.page_token = answer.next_page_token


async def rows(replica: Replica) -> dict[str, dict[str, Any]]:
    async with replica.database.reading() as connection:
        found = {row.task_id: row._asdict() for row in await connection.execute(select(task_table))}
    for row in found.values():
        if row["state"] == "RUNNING":
            for name in PASSING:
                del row[name]
    return found


async def every_fate(replica: Replica) -> None:
    """Leave tasks behind that have been through all that may happen to one."""
    operation = media_pb2.Operation(resize=media_pb2.Resize(width=20))
    items = [pb.CreateTaskBatchRequest.Item(input_file_id=PHOTO, operation=operation)] * 3
    await replica.user().CreateTaskBatch(pb.CreateTaskBatchRequest(items=items, deadline_duration={"seconds": 900}))
    done, broken = await replica.claimed(), await replica.claimed()
    await replica.worker.RenewLease(renewal(done, 0.5))
    await replica.complete(done)
    await replica.fail(broken)
    await replica.user().RetryTask(pb.RetryTaskRequest(task_id=broken.task_id))
    for _ in range(2 * TWICE.attempts):  # the batch's last one and the retried one become dead letters
        await replica.fail(await replica.claimed(), transient=True)
    unwanted = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=unwanted.task_id))
    late = await replica.create(deadline=timedelta(seconds=1))
    await eventually(lambda: replica.tasks.late(1))
    await replica.upkeep.end_late()
    assert (await replica.user().GetTask(pb.GetTaskRequest(task_id=late.task_id))).state == pb.Task.STATE_FAILED
    await replica.create()
    running = await replica.claimed()
    await replica.worker.RenewLease(renewal(running, 0.25))
    await replica.create()


async def test_what_tasks_are_is_what_their_events_say(replica: Replica):
    await every_fate(replica)

    assert await replayed(replica) == {}


async def test_a_lost_table_is_rebuilt(replica: Replica, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(handlers, "REPLAYED_AT_ONCE", 2)
    await every_fate(replica)
    before = await rows(replica)
    async with replica.database.transaction() as connection:
        await connection.execute(delete(task_table))

    missing = await replayed(replica)
    assert await rows(replica) == {}  # only told
    await replayed(replica, rebuild=True)

    assert missing == {task_id: [] for task_id in before}
    assert await rows(replica) == before
    assert await replayed(replica) == {}
    assert (await replica.claimed()).state == pb.Task.STATE_RUNNING  # and work goes on


async def test_a_damaged_task_is_told_and_mended(replica: Replica):
    task = await replica.create()
    sound = await rows(replica)
    harm = update(task_table).where(task_table.c.task_id == task.task_id).values(state="SUCCEEDED", user_id=STRANGER)
    async with replica.database.transaction() as connection:
        await connection.execute(harm)

    told = await replayed(replica, rebuild=True)

    assert {task_id: set(fields) for task_id, fields in told.items()} == {task.task_id: {"state", "user_id"}}
    assert await rows(replica) == sound


async def test_tasks_from_before_there_were_facts_are_left_alone(replica: Replica):
    old, young = await replica.create(), await replica.create()
    async with replica.database.transaction() as connection:
        bare = update(event_table).where(event_table.c.task_id == old.task_id)
        await connection.execute(bare.values(facts=null()))
        await connection.execute(delete(task_table).where(task_table.c.task_id == old.task_id))

    stub = TaskServiceStub(replica.server.channel(user="usr_admin", role="ROLE_ADMIN"))
    answer = await stub.ReplayTasks(pb.ReplayTasksRequest(rebuild=True))

    assert (answer.replayed_count, answer.incomplete_count, list(answer.discrepancies)) == (1, 1, [])
    assert [task.task_id for task in (await replica.user().ListTasks(pb.ListTasksRequest())).tasks] == [young.task_id]


async def test_a_task_without_events_is_told_and_left_alone(replica: Replica):
    task = await replica.create()
    async with replica.database.transaction() as connection:
        await connection.execute(delete(event_table).where(event_table.c.task_id == task.task_id))

    stub = TaskServiceStub(replica.server.channel(user="usr_admin", role="ROLE_ADMIN"))
    answer = await stub.ReplayTasks(pb.ReplayTasksRequest(rebuild=True))

    assert (answer.replayed_count, answer.incomplete_count, list(answer.discrepancies)) == (0, 1, [])
    assert set(await rows(replica)) == {task.task_id}


@pytest.mark.parametrize("harm", [update(task_table).values(request_id="?"), delete(task_table)])
async def test_a_living_worker_keeps_a_task_that_is_mended_under_it(replica: Replica, harm: Any):
    await replica.create()
    claimed = await replica.claimed()
    taken = event_table.c.state == "RUNNING"
    async with replica.database.transaction() as connection:
        # Claimed a minute ago, and renewed since: no event tells of that.
        facts = dict((await connection.execute(select(event_table.c.facts).where(taken))).scalar_one())
        for name in ("lease_time", "update_time"):
            facts[name] = (datetime.fromisoformat(facts[name]) - timedelta(minutes=1)).isoformat()
        await connection.execute(update(event_table).where(taken).values(facts=facts))
        await connection.execute(harm)

    assert set(await replayed(replica, rebuild=True)) == {claimed.task_id}

    assert await replica.tasks.lapsed(1) == []
    await replica.complete(claimed)


async def test_only_administrators_may(replica: Replica):
    refusal = await refused(replica.user(OWNER).ReplayTasks(pb.ReplayTasksRequest()))
    assert refusal.reason == "ROLE_REQUIRED"
