"""CreateTask: what it needs, what it leaves, and what a crash anywhere leaves for the next call."""

import asyncio
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from atelier.media.v1 import media_pb2
from atelier.task.v1 import events_pb2
from atelier.task.v1 import task_pb2 as pb

from mesh.errors import Unavailable
from services.task import domain
from tests.service.task.conftest import (
    MARK,
    OWNER,
    PHOTO,
    STRANGER,
    TEXT,
    Replica,
    Start,
    Storage,
    Users,
    refused,
    resize,
)


async def everything(replica: Replica) -> list[pb.Task]:
    return list((await replica.user().ListTasks(pb.ListTasksRequest())).tasks)


async def test_a_created_task_waits_with_what_was_asked(replica: Replica, users: Users):
    task = await replica.create(width=640)

    assert task.task_id.startswith("tsk_")
    assert (task.state, task.attempt, task.user_id) == (pb.Task.STATE_QUEUED, 0, OWNER)
    assert task.operation.resize.width == 640
    assert (task.progress.fraction, task.progress.stage) == (0, "queued")
    assert users.reserved == {f"{task.task_id}/1"}
    assert await everything(replica) == [task]


async def test_a_created_task_sends_its_event_and_a_permit(replica: Replica):
    task = await replica.create()

    event, permit = await replica.sent()

    assert (event.exchange, event.routing_key) == ("atelier.events", "atelier.task.v1.TaskCreated")
    assert events_pb2.TaskCreated.FromString(event.body) == events_pb2.TaskCreated(
        task_id=task.task_id, user_id=OWNER, reservation_id=f"{task.task_id}/1"
    )
    assert (permit.exchange, permit.routing_key) == ("", "media.cpu")


async def test_without_a_request_id_each_call_makes_a_task(replica: Replica):
    first, second = await replica.create(), await replica.create()

    assert first.task_id != second.task_id


async def test_a_repeated_key_answers_the_first_task_as_it_is_now(replica: Replica, users: Users):
    first = await replica.create(request_id="key")
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=first.task_id))

    second = await replica.create(request_id="key")

    assert (second.task_id, second.state) == (first.task_id, pb.Task.STATE_CANCELLED)
    assert len(users.reserved) == 1


async def test_a_repeated_key_needs_no_storage(replica: Replica, storage: Storage):
    first = await replica.create(request_id="key")
    storage.answers.clear()

    async with asyncio.timeout(2):  # a call of storage's is given up later
        second = await replica.create(request_id="key")

    assert second == first


async def test_the_idempotency_key_header_is_a_request_id(replica: Replica):
    calls = [replica.user(idempotency_key="key").CreateTask(resize()) for _ in range(2)]

    first, second = await asyncio.gather(*calls)

    assert first == second


async def test_a_key_is_its_users_own(replica: Replica):
    await replica.create(request_id="key")

    refusal = await refused(replica.user(STRANGER).CreateTask(resize(request_id="key")))

    assert refusal.reason == "FILE_NOT_FOUND"  # a request of its own, not the owner's task


async def test_a_key_used_for_another_request_is_refused(replica: Replica):
    await replica.create(request_id="key", width=1)

    refusal = await refused(replica.create(request_id="key", width=2))

    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED")
    assert refusal.metadata["request_id"] == "key"


async def test_a_key_that_no_database_can_hold_is_its_callers_trouble_alone(replica: Replica):
    others = [replica.create(request_id=f"key {number}") for number in range(20)]

    refusal, *tasks = await asyncio.gather(refused(replica.create(request_id="a\0b")), *others)

    assert (refusal.code, refusal.reason, refusal.metadata) == (
        "INVALID_ARGUMENT", "FIELD_MALFORMED", {"field": "requestId"}
    )  # fmt: skip
    assert len({task.task_id for task in tasks}) == len(others)


async def test_fifty_calls_with_one_key_make_one_task(start: Start, users: Users):
    """R-24, as far as the task service answers for it."""
    replicas = [await start(), await start()]

    answers = await asyncio.gather(*(replicas[n % 2].create(request_id="key") for n in range(50)))

    assert all(answer == answers[0] for answer in answers)
    assert users.reserved == {f"{answers[0].task_id}/1"}
    assert len(await everything(replicas[0])) == 1
    assert len(await replicas[0].sent()) == 2


async def test_of_tasks_that_are_created_at_once_one_that_is_refused_stops_no_other(replica: Replica):
    """And each owner's get turns of their own."""

    def refuse(_: object) -> domain.Change:
        raise Unavailable("too late")

    def create(user_id: str, task_id: str) -> Any:
        made = partial(
            domain.created, task_id=task_id, user_id=user_id, role="ROLE_USER",
            input_file_id=PHOTO, file_ids=(PHOTO,), operation=b"",
        )  # fmt: skip
        return replica.tasks.add(task_id, made)

    before = await create(OWNER, "tsk_0")
    again, refused_, second, third, strangers, repeated = await asyncio.gather(
        create(OWNER, "tsk_0"),
        replica.tasks.add("tsk_1", refuse),
        create(OWNER, "tsk_2"),
        create(OWNER, "tsk_3"),
        create(STRANGER, "tsk_4"),
        create(OWNER, "tsk_3"),
        return_exceptions=True,
    )

    assert (again, repeated) == (before, third)
    assert str(refused_) == "too late"
    assert before.turn < second.turn < third.turn
    assert before.turn == strangers.turn == 0
    assert sorted(task.task_id for task in await everything(replica)) == ["tsk_0", "tsk_2", "tsk_3"]
    assert [len(history.events) for history in await replica.tasks.histories(["tsk_3", "tsk_4"])] == [1, 1]


@pytest.mark.parametrize(
    "step",
    ["before the key", "after the key", "before the transaction", "inside the transaction", "after the commit"],
)
async def test_what_a_crash_left_half_done_the_next_call_finishes(replica: Replica, users: Users, step: str):
    replica.tasks.crash_at = step
    crash = await refused(replica.create(request_id="key"))

    task = await replica.create(request_id="key")

    assert crash.code == "INTERNAL"
    assert await everything(replica) == [task]
    assert users.reserved == {f"{task.task_id}/1"}
    assert len(await replica.sent()) == 2


@pytest.mark.parametrize("peer", ["storage", "users"])
async def test_what_a_lost_peer_left_half_done_the_next_call_finishes(
    replica: Replica, storage: Storage, users: Users, peer: str
):
    lost = {"storage": storage, "users": users}[peer]
    lost.failure = Unavailable("away", retry_after_seconds=1)
    refusal = await refused(replica.create(request_id="key"))
    nothing = await everything(replica)
    lost.failure = None

    task = await replica.create(request_id="key")

    assert (refusal.code, refusal.retry_after_seconds, nothing) == ("UNAVAILABLE", 1, [])
    assert await everything(replica) == [task]
    assert users.reserved == {f"{task.task_id}/1"}


async def test_a_reservation_older_than_a_minute_is_not_committed_on(replica: Replica, users: Users):
    def a_minute_passes():
        replica.clock.time += timedelta(seconds=61)

    users.takes = a_minute_passes

    refusal = await refused(replica.create())

    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "RESERVATION_TOO_OLD")
    assert await everything(replica) == []


@pytest.mark.parametrize("file_id", ["fil_none", "fil_of_another"])
async def test_a_file_that_is_not_ones_own_is_refused(replica: Replica, users: Users, file_id: str):
    refusal = await refused(replica.create(file_id=file_id))

    assert (refusal.code, refusal.reason, refusal.metadata["file_id"]) == ("NOT_FOUND", "FILE_NOT_FOUND", file_id)
    assert users.reserved == set()


async def test_a_file_that_is_no_image_is_refused(replica: Replica, users: Users):
    refusal = await refused(replica.create(file_id=TEXT))

    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "INPUT_UNSUPPORTED")
    assert refusal.metadata["content_type"] == "text/plain"
    assert "image/avif" in refusal.metadata["supported"]
    assert users.reserved == set()


@pytest.mark.parametrize(("mark", "reason"), [(TEXT, "INPUT_UNSUPPORTED"), ("fil_none", "FILE_NOT_FOUND")])
async def test_a_watermarks_image_is_checked_too(replica: Replica, mark: str, reason: str):
    refusal = await refused(replica.user().CreateTask(watermark(mark)))

    assert (refusal.reason, refusal.metadata["file_id"]) == (reason, mark)


async def test_a_worker_may_read_the_watermarks_image(replica: Replica):
    await replica.user().CreateTask(watermark(MARK))

    task = await replica.tasks.find((await replica.claimed()).task_id)

    assert task is not None
    assert task.file_ids == (PHOTO, MARK)


async def test_a_quota_that_is_used_up_is_told_and_nothing_is_stored(replica: Replica, users: Users):
    users.limit = 0

    refusal = await refused(replica.create(request_id="key"))

    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert refusal.metadata["limit"] == "0"
    assert await everything(replica) == []
    assert await replica.sent() == []


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (
            pb.CreateTaskRequest(operation=media_pb2.Operation(resize=media_pb2.Resize(width=1))),
            "INPUT_FILE_ID_REQUIRED",
        ),
        (pb.CreateTaskRequest(input_file_id=PHOTO), "OPERATION_REQUIRED"),
        (pb.CreateTaskRequest(input_file_id=PHOTO, operation=media_pb2.Operation()), "OPERATION_REQUIRED"),
    ],
)
async def test_a_request_that_lacks_something_is_refused(replica: Replica, request_: pb.CreateTaskRequest, reason: str):
    refusal = await refused(replica.user().CreateTask(request_))

    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)


def watermark(mark: str) -> pb.CreateTaskRequest:
    image = media_pb2.Watermark.Image(file_id=mark)
    operation = media_pb2.Operation(watermark=media_pb2.Watermark(image=image))
    return pb.CreateTaskRequest(input_file_id=PHOTO, operation=operation)
