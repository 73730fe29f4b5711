"""ListDeadLetters and RedriveTasks: what used up its attempts is kept in sight, and can be queued again."""

from datetime import timedelta

import pytest
from atelier.task.v1 import task_pb2 as pb
from atelier.task.v1.task_pb2_grpc import TaskServiceStub

from services.task.domain import Terms
from tests.service.task.conftest import OWNER, Replica, Start, Users, refused, resize
from tests.service.task.test_working_on_tasks import history

ONCE = Terms(attempts=1, backoff=timedelta(milliseconds=1))
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
async def replica(start: Start) -> Replica:
    """A replica that tries each task once."""
    return await start(ONCE)


def admin(replica: Replica) -> TaskServiceStub:
    return TaskServiceStub(replica.server.channel(user="usr_admin", role="ROLE_ADMIN"))


async def dead(replica: Replica, reason: str = "STORAGE_AWAY") -> pb.Task:
    """Return a task that has used up its attempts."""
    await replica.create()
    task = await replica.claimed()
    error = pb.Task.Error(code=14, message="Not now.", reason=reason)
    await replica.worker.FailTask(
        pb.FailTaskRequest(task_id=task.task_id, attempt=task.attempt, error=error, transient=True)
    )
    return task


async def letters(replica: Replica, reason: str = "") -> list[pb.DeadLetter]:
    return list((await admin(replica).ListDeadLetters(pb.ListDeadLettersRequest(reason=reason))).dead_letters)


async def test_a_task_that_used_up_its_attempts_leaves_a_dead_letter(replica: Replica):
    traced = replica.user(traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")
    created = await traced.CreateTask(resize())
    task = await replica.claimed()
    error = pb.Task.Error(code=14, message="Not now.", reason="STORAGE_AWAY")
    await replica.worker.FailTask(pb.FailTaskRequest(task_id=task.task_id, attempt=1, error=error, transient=True))

    [letter] = await letters(replica)

    assert (letter.task_id, letter.user_id, letter.error, letter.attempts) == (created.task_id, OWNER, error, 1)
    assert (letter.request_id, letter.trace_id) == ("req-test", TRACE)
    assert letter.create_time == created.create_time
    assert letter.dead_time.ToDatetime() >= letter.create_time.ToDatetime()


async def test_what_can_never_succeed_or_was_cancelled_leaves_none(replica: Replica):
    await replica.create()
    await replica.fail(await replica.claimed())
    cancelled = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=cancelled.task_id))

    assert await letters(replica) == []


async def test_dead_letters_come_oldest_first_in_pages_and_by_reason(replica: Replica):
    died = [(await dead(replica)).task_id for _ in range(3)]
    other = await dead(replica, "WORKER_LOST")

    seen, token = [], ""
    for _ in range(2):
        request = pb.ListDeadLettersRequest(page_size=2, page_token=token)
        page = await admin(replica).ListDeadLetters(request)
        seen += [letter.task_id for letter in page.dead_letters]
        token = page.next_page_token

    assert (seen, token) == ([*died, other.task_id], "")
    assert [letter.task_id for letter in await letters(replica, "WORKER_LOST")] == [other.task_id]


async def test_a_redriven_task_has_fresh_attempts_and_a_new_reservation(replica: Replica, users: Users):
    task = await dead(replica)

    answer = await admin(replica).RedriveTasks(pb.RedriveTasksRequest(task_ids=[task.task_id]))

    assert (list(answer.task_ids), len(answer.refusals), await letters(replica)) == ([task.task_id], 0, [])
    assert users.reserved == {f"{task.task_id}/1", f"{task.task_id}/2"}
    await replica.complete(await replica.claimed())
    assert (await history(replica, task))[3:] == [("QUEUED", 1, "REDRIVEN"), ("RUNNING", 2, ""), ("SUCCEEDED", 2, "")]


async def test_all_of_a_reason_are_redriven(replica: Replica):
    died = [(await dead(replica)).task_id for _ in range(3)]
    other = await dead(replica, "WORKER_LOST")

    answer = await admin(replica).RedriveTasks(pb.RedriveTasksRequest(reason="STORAGE_AWAY"))

    assert (list(answer.task_ids), answer.next_page_token) == (died, "")
    assert [letter.task_id for letter in await letters(replica)] == [other.task_id]


async def test_what_cannot_be_redriven_is_told_by_task_and_the_rest_is(replica: Replica, users: Users):
    one, two = await dead(replica), await dead(replica)
    queued = await replica.create()
    users.limit = len(users.reserved) + 1
    wanted = [one.task_id, queued.task_id, "tsk_none", two.task_id]

    answer = await admin(replica).RedriveTasks(pb.RedriveTasksRequest(task_ids=wanted))

    assert list(answer.task_ids) == [one.task_id]
    assert [(each.task_id, each.reason) for each in answer.refusals] == [
        (queued.task_id, "TASK_NOT_DEAD"),
        ("tsk_none", "TASK_NOT_FOUND"),
        (two.task_id, "QUOTA_EXCEEDED"),
    ]
    assert [letter.task_id for letter in await letters(replica)] == [two.task_id]


async def test_its_owner_may_retry_a_dead_letter_too(replica: Replica):
    task = await dead(replica)

    await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))

    assert await letters(replica) == []


@pytest.mark.parametrize("request_", [pb.RedriveTasksRequest(), pb.RedriveTasksRequest(task_ids=["t"], reason="R")])
async def test_a_redrive_of_nothing_or_of_two_things_is_refused(replica: Replica, request_: pb.RedriveTasksRequest):
    refusal = await refused(admin(replica).RedriveTasks(request_))

    assert (refusal.code, refusal.reason, refusal.metadata) == (
        "INVALID_ARGUMENT",
        "REDRIVE_OF_WHAT",
        {"fields": "taskIds, reason"},
    )


async def test_only_administrators_may_look_and_redrive(replica: Replica):
    for call in (
        replica.user().ListDeadLetters(pb.ListDeadLettersRequest()),
        replica.user().RedriveTasks(pb.RedriveTasksRequest(reason="WORKER_LOST")),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason, refusal.metadata["role"]) == (
            "PERMISSION_DENIED",
            "ROLE_REQUIRED",
            "ROLE_USER",
        )
