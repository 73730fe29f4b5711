"""Deadlines of tasks: who ends those that are late, and what that leaves."""

import asyncio
from datetime import timedelta

import pytest
from atelier.task.v1 import events_pb2
from atelier.task.v1 import task_pb2 as pb

from services.task import upkeep
from services.task.domain import Terms
from services.task.upkeep import Upkeep
from tests.eventually import eventually
from tests.service.task.conftest import BRISK, Bus, Replica, Start, Users, refused
from tests.service.task.test_working_on_tasks import history, renewal

SECOND = timedelta(seconds=1)  # the shortest that the contract allows


async def ended_late(replica: Replica) -> None:
    """Wait until a deadline has passed, and take upkeep's step."""
    await eventually(lambda: replica.tasks.late(1))
    await Upkeep(replica.tasks, Bus(), lambda: BRISK).end_late()


async def test_a_task_that_waits_past_its_deadline_fails_and_gives_its_quota_back(replica: Replica):
    task = await replica.create(deadline=SECOND)
    assert task.deadline_time.ToDatetime() == task.create_time.ToDatetime() + SECOND

    await ended_late(replica)

    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    assert (found.state, found.error.code, found.error.reason) == (pb.Task.STATE_FAILED, 4, "TASK_DEADLINE_EXCEEDED")
    event = (await replica.sent())[-1]
    assert events_pb2.TaskFailed.FromString(event.body).reservation_id == f"{task.task_id}/1"
    assert await replica.claim() is None


async def test_the_worker_of_a_late_task_learns_it_with_its_next_renewal(start: Start):
    replica = await start(Terms())
    await replica.create(deadline=SECOND)
    task = await replica.claimed()

    await ended_late(replica)

    assert (await refused(replica.worker.RenewLease(renewal(task, 0.5)))).reason == "LEASE_LOST"
    assert (await refused(replica.complete(task))).reason == "LEASE_LOST"


async def test_a_result_that_comes_before_anybody_noticed_counts(start: Start):
    replica = await start(Terms())
    await replica.create(deadline=SECOND)
    task = await replica.claimed()
    await eventually(lambda: replica.tasks.late(1))

    await replica.complete(task)

    assert await replica.tasks.late(1) == []


async def test_a_late_task_that_cannot_be_changed_holds_up_no_other(replica: Replica, monkeypatch: pytest.MonkeyPatch):
    for _ in range(4):
        await replica.create(deadline=SECOND)

    async def all_late() -> bool:
        return len(await replica.tasks.late(5)) == 4

    await eventually(all_late)
    first, second, *_ = await replica.tasks.late(4)
    replica.tasks.broken_id = first
    monkeypatch.setattr(upkeep, "AT_ONCE", 2)
    await asyncio.wait_for(Upkeep(replica.tasks, Bus(), lambda: BRISK).end_late(), 30)

    assert await replica.tasks.late(4) == [first]
    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=second))
    assert found.state == pb.Task.STATE_FAILED


async def test_late_tasks_of_which_none_can_be_changed_are_left_to_the_next_round(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
):
    task = await replica.create(deadline=SECOND)
    replica.tasks.broken_id = task.task_id
    monkeypatch.setattr(upkeep, "AT_ONCE", 1)

    await asyncio.wait_for(ended_late(replica), 30)

    assert await replica.tasks.late(1) == [task.task_id]


async def test_two_replicas_end_a_late_task_once(start: Start):
    replicas = [await start(), await start()]
    task = await replicas[0].create(deadline=SECOND)

    await eventually(lambda: replicas[0].tasks.late(1))
    await asyncio.gather(*(Upkeep(each.tasks, Bus(), lambda: BRISK).end_late() for each in replicas))

    assert await history(replicas[0], task) == [("QUEUED", 0, ""), ("FAILED", 0, "TASK_DEADLINE_EXCEEDED")]


async def test_a_late_task_that_is_retried_has_its_time_again(replica: Replica, users: Users):
    task = await replica.create(deadline=SECOND)
    await ended_late(replica)

    retried = await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))

    assert retried.deadline_time.ToDatetime() == retried.update_time.ToDatetime() + SECOND
    assert users.reserved == {f"{task.task_id}/1", f"{task.task_id}/2"}


@pytest.mark.parametrize("seconds", [0.5, 2_592_001])
async def test_a_deadline_that_makes_no_sense_is_refused(replica: Replica, seconds: float):
    refusal = await refused(replica.create(deadline=timedelta(seconds=seconds)))

    assert (refusal.reason, refusal.metadata["field"]) == ("FIELD_OUT_OF_RANGE", "deadlineDuration")
