"""Which workers a task is for: the contract says what each operation needs."""

from __future__ import annotations

from datetime import timedelta

import pytest
from atelier.media.v1 import media_pb2
from atelier.policy.v1 import policy_pb2
from atelier.task.v1 import task_pb2 as pb
from google.protobuf.descriptor import Descriptor

from services.task.convert import pool_of
from services.task.domain import PERMITS, POOLS, UNSERVED
from services.task.upkeep import Upkeep
from tests.service.task.conftest import BRISK, PHOTO, Bus, Replica

CUT_OUT = media_pb2.Operation(remove_background=media_pb2.RemoveBackground())
SMALLER = media_pb2.Operation(resize=media_pb2.Resize(width=10))
RESIZE = media_pb2.Pipeline.Step(resize=media_pb2.Resize(width=10))
UPSCALE = media_pb2.Pipeline.Step(upscale=media_pb2.Upscale())


def pipeline(*steps: media_pb2.Pipeline.Step) -> media_pb2.Operation:
    return media_pb2.Operation(pipeline=media_pb2.Pipeline(steps=steps))


@pytest.mark.parametrize(
    ("operation", "pool"),
    [
        (SMALLER, "cpu"),
        (CUT_OUT, "gpu"),
        (pipeline(RESIZE), "cpu"),
        (pipeline(RESIZE, UPSCALE, RESIZE), "gpu"),  # as demanding as its most demanding step
        (media_pb2.Operation(), "cpu"),
    ],
)
def test_a_task_goes_to_the_most_demanding_pool_that_it_names(operation: media_pb2.Operation, pool: str):
    assert pool_of(operation) == pool


def test_every_pool_that_the_contract_names_is_known():
    def named(message: Descriptor, seen: set[str]) -> set[str]:
        if message.full_name in seen:
            return set()
        seen.add(message.full_name)
        own = {field.GetOptions().Extensions[policy_pb2.pool] for field in message.fields}
        inner = [named(field.message_type, seen) for field in message.fields if field.message_type]
        return own.union(*inner) - {""}

    assert named(media_pb2.Operation.DESCRIPTOR, set()) == {"gpu"}
    assert set(POOLS) == {"cpu", "gpu"}


def asked(operation: media_pb2.Operation) -> pb.CreateTaskRequest:
    return pb.CreateTaskRequest(input_file_id=PHOTO, operation=operation)


async def claimed(replica: Replica, pool: str) -> str:
    answer = await replica.worker.ClaimTask(pb.ClaimTaskRequest(pool=pool, worker_id="worker-1"))
    return answer.assignment.task.task_id


async def permits(replica: Replica) -> list[str]:
    """Return the queues to which permits were sent."""
    return [each.routing_key for each in await replica.sent() if not each.exchange]


async def test_a_task_is_claimed_from_its_pool_alone(replica: Replica):
    task = await replica.user().CreateTask(asked(CUT_OUT))

    assert await claimed(replica, "cpu") == ""
    assert await claimed(replica, "gpu") == task.task_id


async def test_a_tasks_permit_goes_to_the_queue_of_its_pool(replica: Replica):
    await replica.user().CreateTask(asked(CUT_OUT))

    assert await permits(replica) == ["media.gpu"]


def several(*operations: media_pb2.Operation) -> pb.CreateTaskBatchRequest:
    items = [pb.CreateTaskBatchRequest.Item(input_file_id=PHOTO, operation=each) for each in operations]
    return pb.CreateTaskBatchRequest(items=items)


async def test_a_batch_wakes_workers_of_every_pool_it_needs(replica: Replica):
    await replica.user().CreateTaskBatch(several(*[SMALLER, SMALLER, CUT_OUT] * (PERMITS + 1)))

    sent = await permits(replica)
    assert (sent.count("media.cpu"), sent.count("media.gpu")) == (PERMITS, PERMITS)


async def test_a_batch_takes_its_turns_in_each_pool(replica: Replica):
    await replica.user().CreateTaskBatch(several(*[SMALLER] * 20))

    await replica.user().CreateTaskBatch(several(SMALLER, CUT_OUT))

    task = await replica.tasks.find(await claimed(replica, "gpu"))
    assert (task and task.turn) == 0  # its owner's many in the other pool do not stand before it


async def test_permits_that_were_lost_are_published_again_to_the_tasks_pool(replica: Replica, bus: Bus):
    await replica.user().CreateTask(asked(CUT_OUT))

    await Upkeep(replica.tasks, bus, lambda: BRISK, permit_grace=timedelta(0)).replenish()

    assert [each.routing_key for each in bus.waiting] == ["media.gpu"]


async def test_a_pool_that_never_had_a_worker_keeps_no_permits_from_another(replica: Replica, bus: Bus):
    bus.missing = "media.cpu"
    await replica.user().CreateTaskBatch(several(SMALLER, CUT_OUT))

    await Upkeep(replica.tasks, bus, lambda: BRISK, permit_grace=timedelta(0)).replenish()

    assert [each.routing_key for each in bus.waiting] == ["media.gpu"]


async def test_a_pool_without_workers_is_told_apart_from_one_that_has_some(replica: Replica, bus: Bus):
    bus.workerless = "media.gpu"
    task = await replica.user().CreateTask(asked(CUT_OUT))
    other = await replica.user().CreateTask(asked(SMALLER))

    await replica.upkeep.look_for_workers()
    replica.uptime[0] += 61
    await replica.upkeep.look_for_workers()

    assert replica.upkeep.degraded() == "No worker serves the pool gpu; tasks wait."
    shown = [await replica.user().GetTask(pb.GetTaskRequest(task_id=each.task_id)) for each in (task, other)]
    assert [each.progress.stage for each in shown] == [UNSERVED.stage, "queued"]
