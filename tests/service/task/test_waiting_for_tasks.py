"""GetTask with a wait: the end when it comes in time, else the task as it is."""

import asyncio
from datetime import timedelta

import pytest
from atelier.task.v1 import task_pb2 as pb

from mesh import wire
from tests.eventually import eventually
from tests.service.task.conftest import STRANGER, Bus, Replica, Start, refused


def asked(task: pb.Task, seconds: float) -> pb.GetTaskRequest:
    return pb.GetTaskRequest(task_id=task.task_id, wait=wire.duration(timedelta(seconds=seconds)))


async def waiting(replica: Replica, task: pb.Task, seconds: float = 30) -> asyncio.Task[pb.Task]:
    """Return a call that waits for the task's end, once it does."""
    call = asyncio.ensure_future(replica.user().GetTask(asked(task, seconds)))
    await eventually(lambda: replica.watches.has_watchers(task.task_id))
    return call


@pytest.mark.parametrize("broker_away", [False, True])
async def test_a_wait_is_answered_with_the_end_from_any_replica(start: Start, bus: Bus, broker_away: bool):
    bus.away = broker_away
    here, there = await start(), await start()
    call = await waiting(here, await here.create())

    await there.complete(await there.claimed())

    async with asyncio.timeout(10):
        answer = await call
    assert (answer.state, list(answer.output_file_ids)) == (pb.Task.STATE_SUCCEEDED, ["fil_result"])
    assert not here.watches.has_watchers(answer.task_id)


async def test_a_wait_that_is_over_is_answered_with_the_task_as_it_is(replica: Replica):
    task = await replica.create()

    answer = await replica.user().GetTask(asked(task, 0.05))

    assert answer == task


async def test_a_task_that_has_ended_is_answered_at_once(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await replica.complete(task)

    async with asyncio.timeout(10):
        answer = await replica.user().GetTask(asked(task, 30))

    assert answer.state == pb.Task.STATE_SUCCEEDED


async def test_an_instance_that_stops_answers_those_who_wait(replica: Replica):
    task = await replica.create()
    call = await waiting(replica, task)

    replica.server.admission.end_streams()

    async with asyncio.timeout(10):
        assert await call == task


async def test_a_caller_that_leaves_leaves_nothing_behind(replica: Replica):
    task = await replica.create()
    call = await waiting(replica, task)

    call.cancel()

    await eventually(lambda: not replica.watches.has_watchers(task.task_id))


async def test_anothers_task_is_not_waited_for(replica: Replica):
    task = await replica.create()

    refusal = await refused(replica.user(STRANGER).GetTask(asked(task, 30)))

    assert (refusal.code, refusal.reason, refusal.metadata["task_id"]) == ("NOT_FOUND", "TASK_NOT_FOUND", task.task_id)


@pytest.mark.parametrize("seconds", [-1, 30.001])
async def test_a_wait_that_makes_no_sense_is_refused(replica: Replica, seconds: float):
    task = await replica.create()

    refusal = await refused(replica.user().GetTask(asked(task, seconds)))

    assert (refusal.code, refusal.reason, refusal.metadata["field"]) == (
        "INVALID_ARGUMENT",
        "FIELD_OUT_OF_RANGE",
        "wait",
    )
