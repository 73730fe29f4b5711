"""CreateTaskBatch and its parent: all or none, once, cancelled together, and which item was to blame."""

import asyncio

import pytest
from atelier.media.v1 import media_pb2
from atelier.task.v1 import task_pb2 as pb

from mesh.errors import Unavailable
from tests.service.task.conftest import MARK, OWNER, PHOTO, STRANGER, TEXT, Replica, Start, Storage, Users, refused

Item = pb.CreateTaskBatchRequest.Item


def resized(file_id: str = PHOTO, width: int = 8) -> Item:
    return Item(input_file_id=file_id, operation=media_pb2.Operation(resize=media_pb2.Resize(width=width)))


def batch(*items: Item, request_id: str = "") -> pb.CreateTaskBatchRequest:
    return pb.CreateTaskBatchRequest(items=items or [resized(width=n) for n in (1, 2, 3)], request_id=request_id)


async def members(replica: Replica, batch_id: str) -> list[pb.Task]:
    return list((await replica.user().ListTasks(pb.ListTasksRequest(batch_id=batch_id, page_size=200))).tasks)


async def everything(replica: Replica) -> list[pb.Task]:
    return await members(replica, "")


async def test_a_batch_makes_its_tasks_in_order_each_with_its_own_reservation(replica: Replica, users: Users):
    made = await replica.user().CreateTaskBatch(batch())

    tasks = [await replica.claimed() for _ in range(3)]
    assert (made.task_count, made.user_id, made.state_counts) == (3, OWNER, pb.TaskBatch.StateCounts(queued=3))
    assert [task.operation.resize.width for task in tasks] == [1, 2, 3]
    assert {task.batch_id for task in tasks} == {made.batch_id}
    assert users.reserved == {f"{task.task_id}/1" for task in tasks}
    sent = [message.routing_key for message in await replica.sent()]
    assert (sent.count("atelier.task.v1.TaskCreated"), sent.count("media.cpu")) == (3, 3)


async def test_a_batch_is_made_with_a_storage_service_that_does_not_know_of_several_files_in_a_call(
    replica: Replica, storage: Storage
):
    storage.is_old = True

    made = await replica.user().CreateTaskBatch(batch(resized(), resized(MARK)))
    refusal = await refused(replica.user().CreateTaskBatch(batch(resized(), resized(TEXT))))

    assert (made.task_count, refusal.reason, refusal.metadata["index"]) == (2, "INPUT_UNSUPPORTED", "1")


async def test_a_batch_is_as_far_as_its_tasks_together(replica: Replica):
    made = await replica.user().CreateTaskBatch(batch(*(resized() for _ in range(4))))
    done, broken, half = [await replica.claimed() for _ in range(3)]
    await replica.complete(done)
    await replica.fail(broken)
    progress = pb.Task.Progress(fraction=0.5, stage="process")
    await replica.worker.RenewLease(pb.RenewLeaseRequest(task_id=half.task_id, attempt=1, progress=progress))

    found = await replica.user().GetTaskBatch(pb.GetTaskBatchRequest(batch_id=made.batch_id))

    assert found.state_counts == pb.TaskBatch.StateCounts(queued=1, running=1, succeeded=1, failed=1)
    assert found.fraction == (1 + 1 + 0.5 + 0) / 4


async def test_a_batchs_tasks_can_be_listed_alone(replica: Replica):
    await replica.create()
    made = await replica.user().CreateTaskBatch(batch())
    await replica.create()

    first = await replica.user().ListTasks(pb.ListTasksRequest(batch_id=made.batch_id, page_size=2))
    rest = await replica.user().ListTasks(
        pb.ListTasksRequest(batch_id=made.batch_id, page_size=2, page_token=first.next_page_token)
    )

    assert [task.operation.resize.width for task in [*first.tasks, *rest.tasks]] == [3, 2, 1]
    assert (await everything(replica))[0].batch_id == ""


async def test_a_batch_is_cancelled_as_one_and_what_has_ended_stays(replica: Replica):
    made = await replica.user().CreateTaskBatch(batch())
    done, running = await replica.claimed(), await replica.claimed()
    await replica.complete(done)
    request = pb.CancelTaskBatchRequest(batch_id=made.batch_id)

    once, twice = [await replica.user().CancelTaskBatch(request) for _ in range(2)]

    assert once.state_counts == twice.state_counts == pb.TaskBatch.StateCounts(succeeded=1, cancelled=2)
    assert (await refused(replica.complete(running))).reason == "LEASE_LOST"
    sent = [message.routing_key for message in await replica.sent()]
    assert sent.count("atelier.task.v1.TaskCancelled") == 2
    assert await replica.claim() is None


async def test_anothers_batch_is_not_found_exactly_as_a_missing_one(replica: Replica):
    made = await replica.user().CreateTaskBatch(batch())

    for batch_id in (made.batch_id, "bat_none"):
        stub = replica.user(STRANGER)
        for call in (
            stub.GetTaskBatch(pb.GetTaskBatchRequest(batch_id=batch_id)),
            stub.CancelTaskBatch(pb.CancelTaskBatchRequest(batch_id=batch_id)),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason, refusal.metadata) == (
                "NOT_FOUND",
                "TASK_BATCH_NOT_FOUND",
                {"batch_id": batch_id},
            )
    others = await replica.user(STRANGER).ListTasks(pb.ListTasksRequest(batch_id=made.batch_id))
    assert not others.tasks


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (resized(TEXT), "INPUT_UNSUPPORTED"),
        (resized("fil_none"), "FILE_NOT_FOUND"),
        (
            Item(
                input_file_id=PHOTO,
                operation=media_pb2.Operation(watermark={"image": {"file_id": TEXT}}),
            ),
            "INPUT_UNSUPPORTED",
        ),
    ],
)
async def test_an_item_that_is_bad_refuses_the_whole_batch_by_name(
    replica: Replica, users: Users, item: Item, reason: str
):
    refusal = await refused(replica.user().CreateTaskBatch(batch(resized(), resized(MARK), item, resized(TEXT))))

    assert (refusal.reason, refusal.metadata["index"]) == (reason, "2")
    assert list(refusal.violations) == ["items[2].inputFileId"]
    assert (await everything(replica), users.reserved) == ([], set())


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.CreateTaskBatchRequest(), "ITEMS_REQUIRED", "items"),
        (batch(*[resized()] * 1001), "FIELD_TOO_LONG", "items"),
        (batch(resized(), Item(input_file_id=PHOTO)), "OPERATION_REQUIRED", "items[1].operation"),
        (batch(resized(), resized(width=-1)), "FIELD_OUT_OF_RANGE", "items[1].operation.resize.width"),
    ],
)
async def test_a_batch_that_breaks_a_bound_is_refused_with_its_place(
    replica: Replica, request_: pb.CreateTaskBatchRequest, reason: str, field: str
):
    refusal = await refused(replica.user().CreateTaskBatch(request_))

    assert (refusal.code, refusal.reason, refusal.metadata["field"]) == ("INVALID_ARGUMENT", reason, field)


async def test_a_batch_of_a_thousand_is_made_and_cancelled(replica: Replica, users: Users):
    made = await replica.user().CreateTaskBatch(batch(*(resized(width=1 + n) for n in range(1000))))

    ended = await replica.user().CancelTaskBatch(pb.CancelTaskBatchRequest(batch_id=made.batch_id))

    assert (made.state_counts.queued, ended.state_counts.cancelled, len(users.reserved)) == (1000, 1000, 1000)
    assert ended.fraction == 1


async def test_over_the_quota_nothing_is_made(replica: Replica, users: Users):
    users.limit = 2

    refusal = await refused(replica.user().CreateTaskBatch(batch()))

    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert (await everything(replica), users.reserved, await replica.sent()) == ([], set(), [])


async def test_fifty_calls_with_one_key_make_one_batch(start: Start, users: Users):
    replicas = [await start(), await start()]

    answers = await asyncio.gather(*(replicas[n % 2].user().CreateTaskBatch(batch(request_id="k")) for n in range(50)))

    assert all(answer == answers[0] for answer in answers)
    assert len(users.reserved) == len(await everything(replicas[0])) == 3


async def test_a_key_used_for_another_batch_is_refused_and_for_a_single_task_is_another(replica: Replica):
    await replica.user().CreateTaskBatch(batch(request_id="key"))

    await replica.create(request_id="key")
    refusal = await refused(replica.user().CreateTaskBatch(batch(resized(), request_id="key")))

    assert (refusal.reason, refusal.metadata["request_id"]) == ("IDEMPOTENCY_KEY_REUSED", "key")


@pytest.mark.parametrize("step", ["after the key", "before the transaction", "inside the transaction"])
async def test_what_a_crash_left_half_done_the_next_call_finishes(replica: Replica, users: Users, step: str):
    replica.tasks.crash_at = step
    crash = await refused(replica.user().CreateTaskBatch(batch(request_id="key")))
    nothing = await everything(replica)

    made = await replica.user().CreateTaskBatch(batch(request_id="key"))

    assert (crash.code, nothing) == ("INTERNAL", [])
    assert users.reserved == {f"{task.task_id}/1" for task in await members(replica, made.batch_id)}
    assert len(await replica.sent()) == 6


async def test_storage_that_is_away_blames_no_item(replica: Replica, storage: Storage):
    storage.failure = Unavailable("away")

    refusal = await refused(replica.user().CreateTaskBatch(batch()))

    assert (refusal.code, refusal.metadata.get("index")) == ("UNAVAILABLE", None)


async def test_a_worker_that_asks_for_several_gets_each_under_its_own_lease(replica: Replica):
    await replica.user().CreateTaskBatch(batch())
    request = pb.ClaimTaskRequest(pool="cpu", worker_id="worker-1", max_tasks=2)

    first, second, third = [await replica.worker.ClaimTask(request) for _ in range(3)]

    widths = [[each.task.operation.resize.width for each in claim.others] for claim in (first, second, third)]
    assert (first.assignment.task.operation.resize.width, second.assignment.task.operation.resize.width) == (1, 3)
    assert (widths, third.HasField("assignment")) == ([[2], [], []], False)
    assert first.assignment.capability != first.others[0].capability
    await replica.complete(first.others[0].task)


async def test_a_worker_that_asks_for_one_gets_one(replica: Replica):
    await replica.user().CreateTaskBatch(batch())

    claim = await replica.worker.ClaimTask(pb.ClaimTaskRequest(pool="cpu", worker_id="worker-1"))

    assert (claim.HasField("assignment"), len(claim.others)) == (True, 0)


async def test_several_who_ask_for_several_at_once_share_the_tasks(start: Start):
    replicas = [await start(), await start()]
    await replicas[0].user().CreateTaskBatch(batch(*(resized() for _ in range(20))))
    request = pb.ClaimTaskRequest(pool="cpu", worker_id="worker-1", max_tasks=3)

    claims = await asyncio.gather(*(replicas[n % 2].worker.ClaimTask(request) for n in range(10)))

    claimed = [each.task.task_id for claim in claims if claim.HasField("assignment")
               for each in (claim.assignment, *claim.others)]  # fmt: skip
    assert len(claimed) == len(set(claimed)) == 20
