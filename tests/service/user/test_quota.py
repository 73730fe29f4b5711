import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from atelier.task.v1 import events_pb2, task_pb2
from atelier.user.v1 import user_pb2 as pb
from sqlalchemy import select, update

from mesh.broker import Delivery
from mesh.errors import FailedPrecondition, MeshError, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from services.user.domain import Kind, State
from services.user.repository import SqlQuotas
from services.user.tables import account, counter, reservation
from tests.databases import are_waiting, on_postgresql
from tests.eventually import eventually

HELD, BOUND = pb.Reservation.STATE_HELD, pb.Reservation.STATE_BOUND
SETTLED, RELEASED = pb.Reservation.STATE_SETTLED, pb.Reservation.STATE_RELEASED


def counts(metric):
    return metric.used, metric.reserved


async def limited(home, user, **limits):
    return await home.stub("usr_admin", "ROLE_ADMIN").SetLimits(pb.SetLimitsRequest(user_id=user.user_id, **limits))


def told(kind, reservation_id, event_id):
    event = kind(task_id=reservation_id.partition("/")[0], user_id="usr_1", reservation_id=reservation_id)
    return Delivery(body=event.SerializeToString(), type=event.DESCRIPTOR.full_name, message_id=event_id, headers={})


async def tell(home, kind, reservation_id, event_id):
    await home.events.take([told(kind, reservation_id, event_id)])


async def settle(home, reservation_id):
    return await home.stub(caller="storage").SettleQuota(pb.SettleQuotaRequest(reservation_id=reservation_id))


async def release(home, reservation_id, caller="storage", user_id=""):
    request = pb.ReleaseQuotaRequest(reservation_id=reservation_id, user_id=user_id)
    await home.stub(caller=caller).ReleaseQuota(request)


async def test_of_a_thousand_parallel_calls_the_limit_s_hundred_pass(home, record_property):
    """R-06."""
    ada = await home.registered()

    async def attempt(number):
        while True:
            try:
                await home.quotas.reserve([f"tsk_{number}/1"], ada.user_id, Kind.TASKS, 1, home.clock.now())
            except Unavailable:
                continue  # a machine that takes longer over a thousand than one may wait for its turn
            except ResourceExhausted as refusal:
                return refusal.reason
            return "passed"

    outcomes = await asyncio.gather(*(attempt(number) for number in range(1000)))

    assert outcomes.count("passed") == 100
    assert outcomes.count("QUOTA_EXCEEDED") == 900
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 100)
    record_property("R-06", f"1,000 calls at once, a limit of 100: {outcomes.count('passed')} passed")


async def test_of_calls_at_once_those_that_fit_pass(home):
    ada, bob = await home.registered(), await home.registered("bob")
    await limited(home, ada, tasks=3)

    def reserve(user_id, *tasks):
        ids = [f"{task}/1" for task in tasks]
        return home.quotas.reserve(ids, user_id, Kind.TASKS, 1, home.clock.now())

    first, second, third, stranger, another = await asyncio.gather(
        reserve(ada.user_id, "tsk_1", "tsk_2"),
        reserve(ada.user_id, "tsk_3", "tsk_4"),
        reserve(ada.user_id, "tsk_5", "tsk_1"),
        reserve("usr_none", "tsk_6"),
        reserve(bob.user_id, "tsk_7"),
        return_exceptions=True,
    )

    assert [each.reservation_id for each in first + third + another] == [
        "tsk_1/1", "tsk_2/1", "tsk_5/1", "tsk_1/1", "tsk_7/1",
    ]  # fmt: skip
    assert (second.reason, stranger.reason) == ("QUOTA_EXCEEDED", "USER_NOT_FOUND")
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 3)
    assert await home.quotas.audit() == []


async def test_parallel_calls_on_the_wire_pass_the_limit_s_number(home):
    ada = await home.registered()
    await limited(home, ada, tasks=10)

    outcomes = await asyncio.gather(
        *(home.reserve(ada.user_id, f"tsk_{number}/1") for number in range(50)), return_exceptions=True
    )

    assert sum(isinstance(outcome, pb.Reservation) for outcome in outcomes) == 10
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, MeshError)} == {"QUOTA_EXCEEDED"}


async def test_a_refusal_says_what_is_used_and_when_to_come_back(home):
    ada = await home.registered()
    await limited(home, ada, tasks=5)
    await home.reserve(ada.user_id, "tsk_1/1", 3)
    await settle(home, "tsk_1/1")

    with pytest.raises(ResourceExhausted) as refusal:
        await home.reserve(ada.user_id, "tsk_2/1", 3)

    assert refusal.value.reason == "QUOTA_EXCEEDED"
    assert refusal.value.metadata == {"metric": "tasks", "limit": "5", "used": "3", "requested": "3"}
    assert refusal.value.retry_after_seconds == timedelta(days=1, hours=12).total_seconds()


async def test_whoever_cancels_and_asks_again_at_once_is_told_to_come_back_in_a_moment(home):
    ada = await home.registered()
    await limited(home, ada, tasks=1)
    await home.reserve(ada.user_id, "tsk_1/1")

    with pytest.raises(ResourceExhausted) as refusal:
        await home.reserve(ada.user_id, "tsk_2/1")
    await tell(home, events_pb2.TaskCancelled, "tsk_1/1", "tsk_1/2")
    await home.reserve(ada.user_id, "tsk_2/1")

    assert refusal.value.retry_after_seconds == 1


async def test_one_reservation_at_once_many_times_is_one(home):
    ada = await home.registered()

    answers = await asyncio.gather(*(home.reserve(ada.user_id, "tsk_1/1") for _ in range(20)))

    assert {answer.state for answer in answers} == {HELD}
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 1)


async def test_nobody_s_quota_cannot_be_reserved(home):
    with pytest.raises(NotFound) as refusal:
        await home.reserve("usr_none", "tsk_1/1")

    assert (refusal.value.reason, refusal.value.metadata["user_id"]) == ("USER_NOT_FOUND", "usr_none")


async def test_only_task_and_storage_reserve(home):
    ada = await home.registered()

    with pytest.raises(PermissionDenied) as refusal:
        await home.stub(caller="media").ReserveQuota(
            pb.ReserveQuotaRequest(reservation_id="x", user_id=ada.user_id, kind=1, amount=1)
        )

    assert refusal.value.metadata["caller"] == "media"


async def test_stored_bytes_are_charged_and_given_back_when_deleted(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "fil_1", 500, storage=True)

    assert (await settle(home, "fil_1")).state == SETTLED
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (500, 0)
    await release(home, "fil_1")
    await release(home, "fil_1")
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (0, 0)


@pytest.mark.parametrize("before", ["nothing", "held", "charged"])
async def test_what_is_charged_at_once_is_charged_once_whatever_was_before(home, before):
    ada = await home.registered()
    if before != "nothing":
        await home.reserve(ada.user_id, "fil_1", 500, storage=True, charge=before == "charged")

    charged = await home.reserve(ada.user_id, "fil_1", 500, storage=True, charge=True)

    assert charged.state == SETTLED
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (500, 0)
    await release(home, "fil_1")
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (0, 0)
    assert await home.quotas.audit() == []


@pytest.mark.parametrize("before", ["nothing", "held", "charged"])
async def test_what_was_given_back_cannot_be_charged_at_once_whatever_was_before(home, before):
    ada = await home.registered()
    if before != "nothing":
        await home.reserve(ada.user_id, "fil_1", 500, storage=True, charge=before == "charged")
    await release(home, "fil_1", user_id=ada.user_id)
    await release(home, "fil_1", user_id=ada.user_id)

    with pytest.raises(FailedPrecondition) as refusal:
        await home.reserve(ada.user_id, "fil_1", 500, storage=True, charge=True)

    assert (refusal.value.reason, refusal.value.metadata["reservation_id"]) == ("RESERVATION_RELEASED", "fil_1")
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (0, 0)
    assert await home.quotas.audit() == []


async def test_of_charges_at_once_only_what_was_given_back_is_refused(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "fil_4", 500, storage=True)
    await release(home, "fil_2", user_id=ada.user_id)

    async def charge(file_id):
        return await home.quotas.reserve([file_id], ada.user_id, Kind.STORAGE_BYTES, 500, home.clock.now(), charge=True)

    outcomes = await asyncio.gather(*(charge(f"fil_{number}") for number in range(5)), return_exceptions=True)

    assert [each.reason for each in outcomes if isinstance(each, MeshError)] == ["RESERVATION_RELEASED"]
    assert isinstance(outcomes[2], MeshError)
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (2000, 0)
    assert await home.quotas.audit() == []


async def test_what_nobody_has_is_given_back_without_complaint(home):
    await release(home, "fil_1", user_id="usr_none")

    assert await home.quotas.audit() == []


@on_postgresql
async def test_what_is_given_back_while_it_is_being_charged_is_not_charged(home):
    ada = await home.registered()
    async with home.sql.transaction() as connection:
        await connection.execute(select(account).where(account.c.user_id == ada.user_id).with_for_update())
        charge = asyncio.create_task(home.reserve(ada.user_id, "fil_1", 500, storage=True, charge=True))
        await eventually(lambda: are_waiting(home.sql, 1))
        back = asyncio.create_task(release(home, "fil_1", user_id=ada.user_id))
        await asyncio.wait([back], timeout=0.5)

    charged, _ = await asyncio.gather(charge, back)

    assert charged.state == SETTLED
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (0, 0)


@on_postgresql
async def test_what_is_given_back_while_its_charge_is_still_to_come_is_not_charged(home):
    ada = await home.registered()
    async with home.sql.transaction() as connection:
        await connection.execute(select(account).where(account.c.user_id == ada.user_id).with_for_update())
        back = asyncio.create_task(release(home, "fil_1", user_id=ada.user_id))
        await eventually(lambda: are_waiting(home.sql, 1))
        charge = asyncio.create_task(home.reserve(ada.user_id, "fil_1", 500, storage=True, charge=True))
        await eventually(lambda: are_waiting(home.sql, 2))

    refusal, _ = await asyncio.gather(charge, back, return_exceptions=True)

    assert refusal.reason == "RESERVATION_RELEASED"
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (0, 0)


async def test_what_is_charged_at_once_must_fit(home):
    ada = await home.registered()
    limit = (await home.quota(ada.user_id)).storage_bytes.limit
    await home.reserve(ada.user_id, "fil_1", limit - 1, storage=True, charge=True)

    with pytest.raises(ResourceExhausted):
        await home.reserve(ada.user_id, "fil_2", 2, storage=True, charge=True)

    assert counts((await home.quota(ada.user_id)).storage_bytes) == (limit - 1, 0)


async def test_settling_again_changes_nothing(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "fil_1", 500, storage=True)

    await asyncio.gather(*(settle(home, "fil_1") for _ in range(5)))

    assert counts((await home.quota(ada.user_id)).storage_bytes) == (500, 0)


async def test_what_was_given_back_cannot_be_charged(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "fil_1", 500, storage=True)
    await release(home, "fil_1")

    with pytest.raises(FailedPrecondition) as refusal:
        await settle(home, "fil_1")

    assert (refusal.value.reason, refusal.value.metadata["reservation_id"]) == ("RESERVATION_RELEASED", "fil_1")


async def test_what_never_was_cannot_be_charged_but_given_back(home):
    await release(home, "fil_1")

    with pytest.raises(NotFound) as refusal:
        await settle(home, "fil_1")

    assert (refusal.value.reason, refusal.value.metadata["reservation_id"]) == ("RESERVATION_NOT_FOUND", "fil_1")


async def test_what_was_given_back_is_counted_when_it_is_reserved_again(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    await release(home, "tsk_1/1", caller="task")

    again = await home.reserve(ada.user_id, "tsk_1/1")

    assert again.state == HELD
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 1)


async def test_reserving_what_is_charged_charges_nothing_more(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "fil_1", 500, storage=True)
    await settle(home, "fil_1")

    assert (await home.reserve(ada.user_id, "fil_1", 500, storage=True)).state == SETTLED
    assert counts((await home.quota(ada.user_id)).storage_bytes) == (500, 0)


async def test_a_limit_that_is_not_set_is_the_role_s(home):
    ada = await home.registered()

    own = await limited(home, ada, tasks=0, storage_bytes=7)
    back = await limited(home, ada, storage_bytes=7)

    assert (own.tasks.limit, own.storage_bytes.limit) == (0, 7)
    assert (back.tasks.limit, back.storage_bytes.limit) == (100, 7)


async def test_a_task_s_success_charges_it(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")

    await tell(home, events_pb2.TaskCreated, "tsk_1/1", "e1")
    await tell(home, events_pb2.TaskSucceeded, "tsk_1/1", "e2")

    assert counts((await home.quota(ada.user_id)).tasks) == (1, 0)


@pytest.mark.parametrize("end", [events_pb2.TaskFailed, events_pb2.TaskCancelled])
async def test_a_task_s_failure_or_cancellation_gives_it_back(home, end):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")

    await tell(home, events_pb2.TaskCreated, "tsk_1/1", "e1")
    await tell(home, end, "tsk_1/1", "e2")

    assert counts((await home.quota(ada.user_id)).tasks) == (0, 0)


@pytest.mark.parametrize(
    ("end", "used"), [(events_pb2.TaskSucceeded, 1), (events_pb2.TaskFailed, 0), (events_pb2.TaskCancelled, 0)]
)
async def test_events_in_the_wrong_order_three_times_each_in_parallel_count_once(home, end, used):
    """R-01, for the user service alone."""
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")

    await asyncio.gather(*(tell(home, end, "tsk_1/1", "e2") for _ in range(3)))
    await asyncio.gather(*(tell(home, events_pb2.TaskCreated, "tsk_1/1", "e1") for _ in range(3)))

    assert counts((await home.quota(ada.user_id)).tasks) == (used, 0)


async def test_an_event_about_an_unknown_reservation_is_taken(home):
    await tell(home, events_pb2.TaskSucceeded, "tsk_9/1", "e1")


async def test_a_task_counts_in_the_month_of_its_reservation(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    home.clock.time = datetime(2026, 11, 1, 0, 5, tzinfo=UTC)

    await tell(home, events_pb2.TaskSucceeded, "tsk_1/1", "e1")

    assert counts((await home.quota(ada.user_id)).tasks) == (0, 0)
    home.clock.time = datetime(2026, 10, 31, 23, 59, tzinfo=UTC)
    assert counts((await home.quota(ada.user_id)).tasks) == (1, 0)


async def test_a_new_month_counts_tasks_anew_but_not_bytes(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1", 100)
    await home.reserve(ada.user_id, "fil_1", 500, storage=True)
    home.clock.time = datetime(2026, 11, 1, tzinfo=UTC)

    await home.reserve(ada.user_id, "tsk_2/1")

    quota = await home.quota(ada.user_id)
    assert counts(quota.tasks) == (0, 1)
    assert counts(quota.storage_bytes) == (0, 500)


async def look_after(home, seconds):
    home.clock.time += timedelta(seconds=seconds)
    await home.upkeep.ask()


async def state_of(home, user, reservation_id):
    return (await home.reserve(user.user_id, reservation_id)).state


async def test_a_reservation_without_a_task_is_given_back_after_two_minutes(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")

    await look_after(home, 119)
    before = counts((await home.quota(ada.user_id)).tasks)
    await look_after(home, 2)

    assert before == (0, 1)
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 0)


async def test_a_repeated_reservation_is_held_anew(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    await look_after(home, 119)
    await home.reserve(ada.user_id, "tsk_1/1")

    await look_after(home, 2)

    assert counts((await home.quota(ada.user_id)).tasks) == (0, 1)


@pytest.mark.parametrize(
    ("state", "round_", "becomes", "used"),
    [
        (task_pb2.Task.STATE_QUEUED, 1, BOUND, (0, 1)),
        (task_pb2.Task.STATE_RUNNING, 1, BOUND, (0, 1)),
        (task_pb2.Task.STATE_SUCCEEDED, 1, SETTLED, (1, 0)),
        (task_pb2.Task.STATE_FAILED, 1, None, (0, 0)),
        (task_pb2.Task.STATE_CANCELLED, 1, None, (0, 0)),
        (task_pb2.Task.STATE_RUNNING, 2, None, (0, 0)),
    ],
)
async def test_a_reservation_that_no_event_reached_follows_its_task(home, state, round_, becomes, used):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    home.tasks.known["tsk_1"] = task_pb2.LookupTaskResponse(state=state, reservation_id=f"tsk_1/{round_}")

    await look_after(home, 121)

    assert counts((await home.quota(ada.user_id)).tasks) == used
    assert becomes is None or await state_of(home, ada, "tsk_1/1") == becomes


@pytest.mark.parametrize(
    ("state", "used"),
    [
        (task_pb2.Task.STATE_QUEUED, (0, 1)),
        (task_pb2.Task.STATE_SUCCEEDED, (1, 0)),
        (task_pb2.Task.STATE_CANCELLED, (0, 0)),
    ],
)
async def test_a_reservation_whose_last_event_was_lost_follows_its_task_after_an_hour(home, state, used):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    await tell(home, events_pb2.TaskCreated, "tsk_1/1", "e1")
    home.tasks.known["tsk_1"] = task_pb2.LookupTaskResponse(state=state, reservation_id="tsk_1/1")

    await look_after(home, 3599)
    before = counts((await home.quota(ada.user_id)).tasks)
    await look_after(home, 2)

    assert before == (0, 1)
    assert counts((await home.quota(ada.user_id)).tasks) == used


async def test_a_task_that_takes_long_is_asked_about_once_an_hour_and_after_what_is_held(home):
    ada = await home.registered()
    await home.reserve_all(ada.user_id, ["tsk_1/1", "tsk_2/1"])
    for number in (1, 2):
        await tell(home, events_pb2.TaskCreated, f"tsk_{number}/1", f"e{number}")
        home.tasks.known[f"tsk_{number}"] = task_pb2.LookupTaskResponse(
            state=task_pb2.Task.STATE_RUNNING, reservation_id=f"tsk_{number}/1"
        )
    home.clock.time += timedelta(hours=1)
    await home.reserve(ada.user_id, "tsk_3/1")
    home.clock.time += timedelta(minutes=3)

    due = await home.quotas.overdue(home.clock.now())
    await home.upkeep.ask()

    assert (due[0], sorted(due)) == ("tsk_3/1", ["tsk_1/1", "tsk_2/1", "tsk_3/1"])
    assert await home.quotas.overdue(home.clock.now() + timedelta(minutes=59)) == []
    assert len(await home.quotas.overdue(home.clock.now() + timedelta(minutes=61))) == 2


async def test_a_reservation_of_which_nothing_is_said_holds_up_no_other(home):
    ada = await home.registered()
    await home.reserve_all(ada.user_id, ["tsk_1/1", "tsk_2/1"])
    home.clock.time += timedelta(minutes=3)
    first, _second = await home.quotas.overdue(home.clock.now())
    home.tasks.refused = first.partition("/")[0]

    for _ in range(60):  # in half of them the other one comes first
        await home.upkeep.ask()

    assert await home.quotas.overdue(home.clock.now()) == [first]


async def test_nothing_is_given_back_while_the_task_service_is_away(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    home.tasks.failure = Unavailable("away")

    await look_after(home, 3600)

    assert counts((await home.quota(ada.user_id)).tasks) == (0, 1)


async def test_nobody_is_asked_about_stored_bytes(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "fil_1", 500, storage=True)

    await look_after(home, 3600)

    assert counts((await home.quota(ada.user_id)).storage_bytes) == (0, 500)


async def test_many_reservations_are_made_all_or_none(home):
    ada = await home.registered()
    await limited(home, ada, tasks=5)
    await home.reserve(ada.user_id, "tsk_0/1", 3)

    with pytest.raises(ResourceExhausted) as refusal:
        await home.reserve_all(ada.user_id, ["tsk_1/1", "tsk_2/1", "tsk_3/1"])
    nothing = counts((await home.quota(ada.user_id)).tasks)
    made = await home.reserve_all(ada.user_id, ["tsk_1/1", "tsk_2/1"])

    assert (refusal.value.reason, refusal.value.metadata["requested"]) == ("QUOTA_EXCEEDED", "3")
    assert nothing == (0, 3)
    assert [(each.reservation_id, each.state) for each in made] == [("tsk_1/1", HELD), ("tsk_2/1", HELD)]
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 5)


async def test_of_many_reservations_each_is_settled_by_itself(home):
    ada = await home.registered()
    await home.reserve_all(ada.user_id, ["tsk_1/1", "tsk_2/1", "tsk_3/1"])

    await tell(home, events_pb2.TaskSucceeded, "tsk_1/1", "e1")
    await tell(home, events_pb2.TaskFailed, "tsk_2/1", "e2")

    assert counts((await home.quota(ada.user_id)).tasks) == (1, 1)


async def test_repeating_many_reservations_counts_each_once_and_a_released_one_again(home):
    ada = await home.registered()
    names = ["tsk_1/1", "tsk_2/1", "tsk_3/1", "tsk_3/1"]
    await home.reserve_all(ada.user_id, names)
    await tell(home, events_pb2.TaskCreated, "tsk_1/1", "e1")
    await release(home, "tsk_2/1", caller="task")

    made = await asyncio.gather(*(home.reserve_all(ada.user_id, names) for _ in range(5)))

    assert [each.state for each in made[-1]] == [BOUND, HELD, HELD, HELD]
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 3)


async def test_only_the_task_service_reserves_many(home):
    with pytest.raises(PermissionDenied) as refusal:
        await home.reserve_all("usr_1", ["tsk_1/1"], caller="storage")

    assert refusal.value.metadata["caller"] == "storage"


@on_postgresql
async def test_a_reservation_that_is_repeated_while_it_is_looked_at_is_kept(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    now = home.clock.now() + timedelta(seconds=121)

    async with home.sql.transaction() as connection:
        await connection.execute(update(reservation).values(update_time=now))  # as a repeated call does
        resolve = asyncio.create_task(home.quotas.resolve("tsk_1/1", State.RELEASED, now))
        await asyncio.wait([resolve], timeout=0.5)
    await resolve

    assert counts((await home.quota(ada.user_id)).tasks) == (0, 1)


async def at_once(home, *calls):
    """Return what calls answer that have all come as far as they get before any may count."""
    async with home.sql.transaction() as connection:
        await connection.execute(select(counter).with_for_update())
        under_way = [asyncio.create_task(call) for call in calls]
        await eventually(lambda: are_waiting(home.sql, len(calls)))
    return await asyncio.gather(*under_way)


@on_postgresql
async def test_two_replicas_that_end_a_reservation_at_once_count_it_once(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1", 5)
    now = home.clock.now()

    await at_once(home, *(home.quotas.move("tsk_1/1", State.SETTLED, now) for _ in range(2)))

    assert counts((await home.quota(ada.user_id)).tasks) == (5, 0)


@on_postgresql
async def test_a_call_that_is_repeated_at_another_replica_at_once_reserves_once(home):
    ada = await home.registered()
    await home.reserve(ada.user_id, "tsk_1/1")
    wanted = (["tsk_2/1"], ada.user_id, Kind.TASKS, 1, home.clock.now())

    first, second = await at_once(home, *(quotas.reserve(*wanted) for quotas in (home.quotas, SqlQuotas(home.sql))))

    assert first == second
    assert counts((await home.quota(ada.user_id)).tasks) == (0, 2)


async def test_events_that_come_together_have_the_effect_of_each_after_the_other(home):
    ada, bob = await home.registered("ada"), await home.registered("bob")
    for user, task_id in ((ada, "tsk_1"), (ada, "tsk_2"), (bob, "tsk_3"), (bob, "tsk_4")):
        await home.reserve(user.user_id, f"{task_id}/1")
    created, succeeded, failed = events_pb2.TaskCreated, events_pb2.TaskSucceeded, events_pb2.TaskFailed

    await home.events.take([
        told(created, "tsk_1/1", "evt_1"), told(succeeded, "tsk_1/1", "evt_2"), told(succeeded, "tsk_1/1", "evt_2"),
        told(failed, "tsk_2/1", "evt_3"), told(succeeded, "tsk_3/1", "evt_4"), told(created, "tsk_3/1", "evt_5"),
        told(failed, "tsk_3/1", "evt_6"), told(created, "tsk_gone/1", "evt_7"),
    ])  # fmt: skip
    await home.events.take([told(succeeded, "tsk_4/1", "evt_2"), told(created, "tsk_4/1", "evt_8")])

    assert counts((await home.quota(ada.user_id)).tasks) == (1, 0)
    assert counts((await home.quota(bob.user_id)).tasks) == (1, 1)  # evt_2 was taken before


async def test_two_who_take_the_same_events_crosswise_settle_them_once(home):
    users = [await home.registered(name) for name in ("ada", "bob", "eve")]
    for number in range(30):
        await home.reserve(users[number % 3].user_id, f"tsk_{number}/1")
    events = [told(events_pb2.TaskSucceeded, f"tsk_{number}/1", f"evt_{number}") for number in range(30)]

    await asyncio.gather(*map(home.events.take, (events, events[::-1], events[10:] + events[:10])))

    assert [counts((await home.quota(user.user_id)).tasks) for user in users] == [(10, 0)] * 3
