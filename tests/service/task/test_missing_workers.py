"""R-21: tasks that nobody will take are an alarm, and say so."""

import asyncio
import logging

import pytest
from atelier.task.v1 import task_pb2 as pb

from services.task.domain import Terms
from tests.service.task.conftest import Bus, Replica, Start

WAITS = "waiting for a worker"


async def stages(replica: Replica, task: pb.Task) -> set[str]:
    """Return what the ways to read a task say of its stage."""
    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    listed = await replica.user().ListTasks(pb.ListTasksRequest())
    return {found.progress.stage, *(each.progress.stage for each in listed.tasks if each.task_id == task.task_id)}


async def looked(replica: Replica, *, after_seconds: float) -> str:
    """Return what operators are told of the service a while later."""
    replica.uptime[0] += after_seconds
    await replica.upkeep.look_for_workers()
    return replica.upkeep.degraded()


async def test_a_minute_of_due_tasks_without_a_worker_is_an_alarm_and_the_task_says_so(
    replica: Replica, bus: Bus, caplog: pytest.LogCaptureFixture
):
    bus.workers = 0
    task = await replica.create()

    said = [await looked(replica, after_seconds=seconds) for seconds in (5, 55, 4.9)]
    before = await stages(replica, task)
    with caplog.at_level(logging.ERROR):
        alarm = await looked(replica, after_seconds=0.2)
        await looked(replica, after_seconds=5)

    assert (said, before) == (["", "", ""], {"queued"})
    assert alarm == "No worker serves the pool cpu; tasks wait."
    assert await stages(replica, task) == {WAITS}
    assert [record.message for record in caplog.records] == ["no worker serves the pool"]


async def test_a_worker_that_comes_ends_the_alarm(replica: Replica, bus: Bus):
    bus.workers = 0
    task = await replica.create()
    await looked(replica, after_seconds=0)
    alarm = await looked(replica, after_seconds=60)
    bus.workers = 1

    well = await looked(replica, after_seconds=5)

    assert (bool(alarm), well, await stages(replica, task)) == (True, "", {"queued"})


async def test_a_worker_that_was_there_in_between_begins_the_minute_anew(replica: Replica, bus: Bus):
    await replica.create()

    for workers in (0, 1, 0):
        bus.workers = workers
        said = await looked(replica, after_seconds=50)

    assert said == ""


async def test_a_pool_without_due_tasks_needs_no_worker(replica: Replica, bus: Bus):
    bus.workers = 0
    await looked(replica, after_seconds=0)

    assert await looked(replica, after_seconds=600) == ""


async def test_without_the_broker_nobody_can_tell_and_what_was_known_stays(replica: Replica, bus: Bus):
    bus.workers = 0
    await replica.create()
    await looked(replica, after_seconds=0)
    bus.away = True
    unknown = await looked(replica, after_seconds=60)
    bus.away = False
    known = await looked(replica, after_seconds=0)
    bus.away = True

    assert (unknown, bool(known), bool(await looked(replica, after_seconds=60))) == ("", True, True)


async def test_one_who_watches_is_told_without_a_change_of_state(start: Start, bus: Bus):
    replica = await start(Terms(), idle_seconds=0.05)
    bus.workers = 0
    task = await replica.create()
    stream = replica.user().WatchTask(pb.WatchTaskRequest(task_id=task.task_id))
    first = await anext(stream)

    await looked(replica, after_seconds=0)
    await looked(replica, after_seconds=60)

    async with asyncio.timeout(10):
        second = await anext(stream)
    assert (first.task.progress.stage, second.task.progress.stage) == ("queued", WAITS)
    assert second.cursor == first.cursor
    await replica.complete(await replica.claimed())
    async with asyncio.timeout(10):
        assert [answer.task.state async for answer in stream][-1] == pb.Task.STATE_SUCCEEDED
