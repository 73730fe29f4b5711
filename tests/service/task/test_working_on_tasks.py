"""What workers may do: claim, renew, complete, fail; and what upkeep does when they do not."""

import asyncio
import json
from datetime import timedelta
from functools import partial

import pytest
from atelier.task.v1 import events_pb2
from atelier.task.v1 import task_pb2 as pb
from sqlalchemy import select

from mesh import capability, status
from mesh.errors import Unavailable
from services.task import domain
from services.task.domain import Terms
from services.task.tables import outbox_table
from services.task.tables import task as task_table
from services.task.upkeep import Upkeep
from tests.databases import are_waiting, on_postgresql
from tests.eventually import eventually
from tests.service.task.conftest import BRISK, KEY, OWNER, PHOTO, Bus, Replica, Start, Storage, refused, resize


async def state(replica: Replica, task: pb.Task) -> str:
    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    return pb.Task.State.Name(found.state)


async def history(replica: Replica, task: pb.Task) -> list[tuple[str, int, str]]:
    answer = await replica.user().ListTaskEvents(pb.ListTaskEventsRequest(task_id=task.task_id))
    assert [event.sequence for event in answer.events] == list(range(1, len(answer.events) + 1))
    return [
        (pb.Task.State.Name(event.state).removeprefix("STATE_"), event.attempt, event.reason) for event in answer.events
    ]


def renewal(task: pb.Task, fraction: float | None = None, stage: str = "process") -> pb.RenewLeaseRequest:
    progress = None if fraction is None else pb.Task.Progress(fraction=fraction, stage=stage)
    return pb.RenewLeaseRequest(task_id=task.task_id, attempt=task.attempt, progress=progress)


async def swept(replica: Replica, terms: Terms = BRISK) -> None:
    """Wait until the leases have lapsed and take the tasks back."""
    await eventually(lambda: replica.tasks.lapsed(1))
    await reaped(replica, terms)


async def two_lost(replica: Replica) -> list[str]:
    """Return the ids of two tasks whose leases have lapsed."""
    for _ in range(2):
        await replica.create()
        await replica.claimed()

    async def both() -> list[str]:
        lost = await replica.tasks.lapsed(2)
        return lost if len(lost) == 2 else []

    return await eventually(both)


async def reaped(replica: Replica, terms: Terms = BRISK) -> None:
    rested = Upkeep(replica.tasks, Bus(), lambda: terms, monotonic=iter([0.0, 1e9]).__next__)
    await rested.reap()


async def test_workers_get_the_oldest_task_first(replica: Replica):
    created = [await replica.create() for _ in range(3)]

    claimed = [await replica.claimed() for _ in range(3)]

    assert [task.task_id for task in claimed] == [task.task_id for task in created]
    assert await replica.claim() is None


async def test_each_task_goes_to_one_worker(start: Start):
    replicas = [await start(Terms()), await start(Terms())]
    for _ in range(5):
        await replicas[0].create()

    claims = await asyncio.gather(*(replicas[n % 2].claim() for n in range(12)))

    claimed = [each.task.task_id for each in claims if each]
    assert len(claimed) == len(set(claimed)) == 5


async def test_a_claim_lets_a_create_go_first(start: Start, storage: Storage):
    """Somebody waits for it, and both want the same cores."""
    replica = await start(claims_wait_seconds=30)
    storage.answers.clear()
    create = asyncio.create_task(replica.create())
    await storage.asked.wait()

    claim = asyncio.create_task(replica.claim())
    await asyncio.wait([claim], timeout=0.3)
    storage.answers.set()

    assignment = await claim
    assert assignment is not None
    assert assignment.task.task_id == (await create).task_id


async def test_a_claim_waits_only_a_moment_for_creates(replica: Replica, storage: Storage):
    task = await replica.create()
    storage.asked.clear()
    storage.answers.clear()
    create = asyncio.create_task(replica.create())
    await storage.asked.wait()

    assignment = await replica.claim()

    assert assignment is not None
    assert assignment.task.task_id == task.task_id
    storage.answers.set()
    await create


async def test_a_claim_does_not_wait_for_creates_that_were_refused(start: Start):
    replica = await start(claims_wait_seconds=30)
    task = await replica.create()
    await refused(replica.create(file_id="fil_unknown"))

    async with asyncio.timeout(10):
        assert (await replica.claimed()).task_id == task.task_id


async def test_a_claim_gives_a_lease_and_a_capability_for_the_tasks_files(replica: Replica):
    task = await replica.create()

    assignment = await replica.claim()

    assert assignment is not None
    assert (assignment.task.state, assignment.task.attempt) == (pb.Task.STATE_RUNNING, 1)
    assert assignment.lease_duration.ToTimedelta() == BRISK.lease
    granted = capability.verify(KEY, assignment.capability)
    assert (granted.task_id, granted.attempt, granted.user_id) == (task.task_id, 1, OWNER)
    assert granted.input_file_ids == (PHOTO,)


async def test_a_pool_without_tasks_gives_nothing(replica: Replica):
    await replica.create()

    answer = await replica.worker.ClaimTask(pb.ClaimTaskRequest(pool="gpu", worker_id="worker-1"))

    assert not answer.HasField("assignment")


async def test_progress_is_shown_and_never_goes_back(replica: Replica):
    await replica.create()
    task = await replica.claimed()

    for fraction in (0.2, 0.6, 0.4):
        await replica.worker.RenewLease(renewal(task, fraction))

    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    assert (found.progress.fraction, found.progress.stage) == (0.6, "process")


async def test_a_completed_task_has_its_result_and_tells_everyone(replica: Replica):
    await replica.create()
    task = await replica.claimed()

    await replica.complete(task)

    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    assert (found.state, list(found.output_file_ids)) == (pb.Task.STATE_SUCCEEDED, ["fil_result"])
    assert (found.progress.fraction, found.progress.stage) == (1, "done")
    assert found.HasField("end_time")
    event = (await replica.sent())[-1]
    assert event.routing_key == "atelier.task.v1.TaskSucceeded"
    assert list(events_pb2.TaskSucceeded.FromString(event.body).output_file_ids) == ["fil_result"]


async def test_completing_twice_with_the_same_file_succeeds_and_tells_once(replica: Replica):
    await replica.create()
    task = await replica.claimed()

    await asyncio.gather(*(replica.complete(task) for _ in range(5)))

    assert len(await replica.sent()) == 3


async def test_completing_twice_with_other_files_is_refused(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await replica.complete(task)

    refusal = await refused(replica.complete(task, "fil_other"))

    assert (refusal.code, refusal.reason) == ("ABORTED", "LEASE_LOST")
    assert refusal.metadata["task_id"] == task.task_id


async def test_a_lease_that_lapses_sends_the_task_out_again_and_fences_the_old_attempt(replica: Replica):
    await replica.create()
    first = await replica.claimed()
    await swept(replica)
    second = await replica.claimed()

    for call in (replica.complete(first), replica.worker.RenewLease(renewal(first)), replica.fail(first)):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason, refusal.metadata["attempt"]) == ("ABORTED", "LEASE_LOST", "1")
    await replica.complete(second)

    assert await history(replica, second) == [
        ("QUEUED", 0, ""),
        ("RUNNING", 1, ""),
        ("QUEUED", 1, "WORKER_LOST"),
        ("RUNNING", 2, ""),
        ("SUCCEEDED", 2, ""),
    ]


async def test_a_task_that_loses_every_worker_fails(replica: Replica):
    await replica.create()
    for _ in range(BRISK.attempts):
        task = await replica.claimed()
        await swept(replica)

    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    assert (found.state, found.error.reason) == (pb.Task.STATE_FAILED, "WORKER_LOST")
    assert (await replica.sent())[-1].routing_key == "atelier.task.v1.TaskFailed"


async def test_a_completion_after_its_lease_counts_when_nobody_took_the_task(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await eventually(lambda: replica.tasks.lapsed(1))

    await replica.complete(task)

    assert await state(replica, task) == "STATE_SUCCEEDED"


async def test_a_renewed_lease_is_not_taken(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await eventually(lambda: replica.tasks.lapsed(1))

    await replica.worker.RenewLease(renewal(task))

    assert await replica.tasks.lapsed(1) == []


async def test_a_lost_task_that_cannot_be_changed_holds_up_no_other(replica: Replica):
    first, _second = await two_lost(replica)
    replica.tasks.broken_id = first
    await reaped(replica)

    assert await replica.tasks.lapsed(2) == [first]


async def test_without_the_database_a_round_ends_and_does_not_wait_for_each_lost_task(replica: Replica):
    lost = await two_lost(replica)
    replica.tasks.broken_id, replica.tasks.bug = lost[0], Unavailable("The database is away.")

    with pytest.raises(Unavailable):
        await reaped(replica)

    assert await replica.tasks.lapsed(2) == lost


async def test_nothing_is_taken_for_one_lease_after_a_start(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await eventually(lambda: replica.tasks.lapsed(1))
    now = [100.0]
    upkeep = Upkeep(replica.tasks, Bus(), lambda: BRISK, monotonic=lambda: now[0])

    now[0] += BRISK.lease.total_seconds()
    await upkeep.reap()
    early = await state(replica, task)
    now[0] += BRISK.lease.total_seconds()
    await upkeep.reap()

    assert (early, await state(replica, task)) == ("STATE_RUNNING", "STATE_QUEUED")


async def test_no_two_claimers_get_the_same_task_and_none_is_passed_over(start: Start):
    replicas = [await start(Terms()), await start(Terms())]
    created = {(await replicas[0].create()).task_id for _ in range(30)}

    claims = await asyncio.gather(*(replica.claim() for replica in replicas * 25))

    claimed = [assignment.task.task_id for assignment in claims if assignment is not None]
    assert sorted(claimed) == sorted(created)


async def test_two_replicas_take_back_a_task_once(start: Start):
    replicas = [await start(), await start()]
    await replicas[0].create()
    task = await replicas[0].claimed()

    await eventually(lambda: replicas[0].tasks.lapsed(1))  # once: whoever looks later may find it taken back
    await asyncio.gather(*map(reaped, replicas))

    assert (await history(replicas[0], task))[-1] == ("QUEUED", 1, "WORKER_LOST")


async def test_a_damaged_input_fails_the_task_at_once(replica: Replica):
    await replica.create()
    task = await replica.claimed()

    answered = await replica.fail(task)

    found = await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    assert answered == found.state == pb.Task.STATE_FAILED
    assert (found.error.code, found.error.reason) == (3, "INPUT_DAMAGED")
    assert (await replica.sent())[-1].routing_key == "atelier.task.v1.TaskFailed"


async def test_a_failure_that_may_pass_is_tried_again_up_to_the_attempts(replica: Replica):
    await replica.create()

    answers = [await replica.fail(await replica.claimed(), transient=True) for _ in range(3)]

    assert answers == [pb.Task.STATE_QUEUED, pb.Task.STATE_QUEUED, pb.Task.STATE_FAILED]


async def test_a_returned_task_goes_out_at_once_with_a_permit_of_its_own(replica: Replica):
    await replica.create()

    for attempt in range(1, 6):
        task = await replica.claimed()
        assert task.attempt == attempt
        assert await replica.fail(task, returned=True) == pb.Task.STATE_QUEUED

    permits = [message for message in await replica.sent() if message.routing_key == "media.cpu"]
    assert len({message.message_id for message in permits}) == 6


async def test_tasks_that_end_in_one_call_each_end_by_themselves(replica: Replica):
    tasks = [await replica.create() for _ in range(3)]
    done = [await replica.claimed() for _ in tasks]
    done[1].attempt += 1

    request = pb.CompleteTasksRequest(
        tasks=[
            pb.CompleteTaskRequest(task_id=task.task_id, attempt=task.attempt, output_file_ids=[f"fil_{task.task_id}"])
            for task in done
        ]
    )
    answer = await replica.worker.CompleteTasks(request)

    assert [status.from_status(each).reason if each.code else "" for each in answer.outcomes] == ["", "LEASE_LOST", ""]
    found = [await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id)) for task in done]
    succeeded, running = pb.Task.STATE_SUCCEEDED, pb.Task.STATE_RUNNING
    assert [task.state for task in found] == [succeeded, running, succeeded]
    assert found[2].output_file_ids == [f"fil_{found[2].task_id}"]


async def test_a_batch_wakes_some_workers_and_upkeep_wakes_more_while_its_tasks_wait(
    replica: Replica,
):
    item = pb.CreateTaskBatchRequest.Item(input_file_id=PHOTO, operation=resize().operation)
    items = [item] * (domain.PERMITS + 5)
    await replica.user().CreateTaskBatch(pb.CreateTaskBatchRequest(items=items))

    permits = [message for message in await replica.sent() if message.routing_key == "media.cpu"]
    assert len(permits) == domain.PERMITS

    bus = Bus()
    bus.waiting = permits[:3]  # workers have taken the others
    await Upkeep(replica.tasks, bus, lambda: BRISK, permit_grace=timedelta(0)).replenish()
    assert len(bus.waiting) == domain.PERMITS


async def test_reporting_a_failure_twice_counts_once(replica: Replica):
    await replica.create()
    task = await replica.claimed()

    answers = [await replica.fail(task, transient=True) for _ in range(2)]

    assert answers == [pb.Task.STATE_QUEUED] * 2
    assert await history(replica, task) == [("QUEUED", 0, ""), ("RUNNING", 1, ""), ("QUEUED", 1, "INPUT_DAMAGED")]


async def test_a_cancelled_queued_task_never_starts(replica: Replica):
    task = await replica.create()

    cancelled = await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))

    assert cancelled.state == pb.Task.STATE_CANCELLED
    assert await replica.claim() is None
    event = (await replica.sent())[-1]
    assert events_pb2.TaskCancelled.FromString(event.body).reservation_id == f"{task.task_id}/1"


async def test_the_worker_of_a_cancelled_task_learns_it_with_its_next_renewal(replica: Replica):
    await replica.create()
    task = await replica.claimed()

    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))

    refusal = await refused(replica.worker.RenewLease(renewal(task, 0.5)))
    assert (refusal.reason, refusal.metadata["state"]) == ("LEASE_LOST", "CANCELLED")
    assert (await refused(replica.complete(task))).reason == "LEASE_LOST"
    assert await state(replica, task) == "STATE_CANCELLED"


async def test_cancelling_twice_succeeds(replica: Replica):
    task = await replica.create()

    for _ in range(2):
        answer = await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))

    assert answer.state == pb.Task.STATE_CANCELLED


@pytest.mark.parametrize("ended", ["SUCCEEDED", "FAILED"])
async def test_a_task_that_ended_cannot_be_cancelled(replica: Replica, ended: str):
    await replica.create()
    task = await replica.claimed()
    await (replica.complete(task) if ended == "SUCCEEDED" else replica.fail(task))

    refusal = await refused(replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id)))

    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TASK_ENDED")
    assert refusal.metadata["state"] == ended


async def test_a_failed_task_can_be_retried_on_a_new_reservation(replica: Replica, users):
    await replica.create()
    task = await replica.claimed()
    await replica.fail(task)

    retried = await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))

    assert (retried.state, retried.HasField("error")) == (pb.Task.STATE_QUEUED, False)
    assert users.reserved == {f"{task.task_id}/1", f"{task.task_id}/2"}
    await replica.complete(await replica.claimed())
    assert await history(replica, task) == [
        ("QUEUED", 0, ""),
        ("RUNNING", 1, ""),
        ("FAILED", 1, "INPUT_DAMAGED"),
        ("QUEUED", 1, "RETRIED"),
        ("RUNNING", 2, ""),
        ("SUCCEEDED", 2, ""),
    ]


async def test_of_two_retries_at_once_one_is_refused(replica: Replica, users):
    task = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))

    calls = [replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id)) for _ in range(2)]
    answers = await asyncio.gather(*calls, return_exceptions=True)

    assert sorted(getattr(answer, "reason", "") for answer in answers) == ["", "TASK_NOT_RETRYABLE"]
    assert users.reserved == {f"{task.task_id}/1", f"{task.task_id}/2"}


async def test_a_retry_over_the_quota_is_refused(replica: Replica, users):
    task = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))
    users.limit = 1

    refusal = await refused(replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id)))

    assert refusal.reason == "QUOTA_EXCEEDED"
    assert await state(replica, task) == "STATE_CANCELLED"


async def test_a_task_that_did_not_end_badly_cannot_be_retried(replica: Replica):
    task = await replica.create()

    refusal = await refused(replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id)))

    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TASK_NOT_RETRYABLE")
    assert refusal.metadata["state"] == "QUEUED"


async def test_an_owner_queues_a_task_again_so_often_and_no_more(replica: Replica, users, monkeypatch):
    monkeypatch.setattr(domain, "ROUNDS", 2)
    request = pb.RetryTaskRequest(task_id=(await replica.create()).task_id)
    cancel = pb.CancelTaskRequest(task_id=request.task_id)
    await replica.user().CancelTask(cancel)
    await replica.user().RetryTask(request)
    await replica.user().CancelTask(cancel)

    refusal = await refused(replica.user().RetryTask(request))

    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TASK_RETRIED_TOO_OFTEN")
    assert users.reserved == {f"{request.task_id}/1", f"{request.task_id}/2"}


async def test_permits_that_the_broker_lost_are_published_again(replica: Replica, bus: Bus):
    upkeep = Upkeep(replica.tasks, bus, lambda: BRISK, permit_grace=timedelta(0))
    for _ in range(3):
        await replica.create()

    await upkeep.replenish()
    await upkeep.replenish()

    assert [message.routing_key for message in bus.waiting] == ["media.cpu"] * 3


async def test_a_fresh_task_is_left_to_its_own_permit(replica: Replica, bus: Bus):
    await replica.create()

    await Upkeep(replica.tasks, bus, lambda: BRISK).replenish()

    assert bus.waiting == []


async def test_other_services_can_ask_where_a_task_stands(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await replica.complete(task)

    for name in ("storage", "user"):
        answer = await replica.service(name).LookupTask(pb.LookupTaskRequest(task_id=task.task_id))

        assert (answer.state, answer.attempt) == (pb.Task.STATE_SUCCEEDED, 1)
        assert list(answer.output_file_ids) == ["fil_result"]
        assert answer.reservation_id == f"{task.task_id}/1"


async def test_a_task_that_nobody_knows_is_not_found(replica: Replica):
    for call in (
        replica.service("user").LookupTask(pb.LookupTaskRequest(task_id="tsk_none")),
        replica.worker.RenewLease(pb.RenewLeaseRequest(task_id="tsk_none", attempt=1)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason, refusal.metadata["task_id"]) == (
            "NOT_FOUND",
            "TASK_NOT_FOUND",
            "tsk_none",
        )


async def test_people_may_not_claim(replica: Replica):
    refusal = await refused(replica.user().ClaimTask(pb.ClaimTaskRequest(pool="cpu", worker_id="me")))

    assert refusal.code == "PERMISSION_DENIED"


async def test_reports_that_come_at_once_have_each_an_effect_and_an_answer_of_its_own(replica: Replica):
    for _ in range(6):
        await replica.create()
    tasks = [await replica.claimed() for _ in range(6)]
    done, broken, stale, gone = tasks[:3], tasks[3], tasks[4], pb.Task(task_id="tsk_none", attempt=1)
    stale.attempt += 1

    answers = await asyncio.gather(
        *(replica.complete(task) for task in [*done, *done, stale, gone]),
        replica.fail(broken),
        *(replica.worker.RenewLease(renewal(tasks[5], fraction)) for fraction in (0.25, 0.5)),
        return_exceptions=True,
    )

    assert [getattr(each, "reason", "") for each in answers] == [""] * 6 + ["LEASE_LOST", "TASK_NOT_FOUND"] + [""] * 3
    states = [(await replica.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))).state for task in tasks]
    assert states == [pb.Task.STATE_SUCCEEDED] * 3 + [pb.Task.STATE_FAILED] + [pb.Task.STATE_RUNNING] * 2
    for task in tasks[:4]:
        assert len(await history(replica, task)) == 3


async def test_steps_with_one_task_at_once_are_events_one_after_the_other(replica: Replica):
    task = await replica.create()
    claimed = partial(domain.claimed, terms=BRISK)
    failure = domain.Failure(14, "Not now.", "STORAGE_AWAY")
    failed = partial(domain.failed, attempt=1, failure=failure, transient=True, terms=BRISK, jitter=0.5)

    first, second = await asyncio.gather(
        replica.tasks.change(task.task_id, claimed), replica.tasks.change(task.task_id, failed)
    )

    assert (first.state, second.state) == (domain.State.RUNNING, domain.State.QUEUED)
    assert [state for state, *_ in await history(replica, task)] == ["QUEUED", "RUNNING", "QUEUED"]


async def test_what_a_task_tells_names_the_request_that_caused_it(replica: Replica):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    await replica.user(traceparent=f"00-{trace}-00f067aa0ba902b7-01").CreateTask(resize())
    await replica.complete(await replica.claimed())

    async with replica.database.reading() as connection:
        rows = (await connection.execute(outbox_table.select())).all()

    told = {
        row.routing_key.rpartition(".")[2]: json.loads(row.headers)
        for row in rows
        if row.routing_key.startswith("atelier.")
    }
    assert {name: headers["correlationid"] for name, headers in told.items()} == dict.fromkeys(told, "req-test")
    assert told["TaskCreated"]["traceparent"].split("-")[1] == trace
    assert trace not in told["TaskSucceeded"].get("traceparent", "")  # its worker's call caused it


@on_postgresql
async def test_what_ends_at_one_replica_is_not_undone_by_a_renewal_at_another(start: Start):
    first, second = await start(Terms()), await start(Terms())
    await first.create()
    task = await first.claimed()
    step = partial(domain.renewed, attempt=1, progress=domain.Progress(0.5, "process"), terms=Terms())

    async with first.database.transaction() as connection:
        await connection.execute(select(task_table).with_for_update())
        completing = asyncio.create_task(first.complete(task))
        await eventually(lambda: are_waiting(first.database, 1))
        renewing = asyncio.create_task(second.tasks.change(task.task_id, step))
        await eventually(lambda: are_waiting(first.database, 2))
    await completing

    assert (await refused(renewing)).reason == "LEASE_LOST"
    found = await first.user().GetTask(pb.GetTaskRequest(task_id=task.task_id))
    assert (found.state, found.progress.fraction) == (pb.Task.STATE_SUCCEEDED, 1)
