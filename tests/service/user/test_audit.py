"""AuditQuotas: what is counted agrees with the ledger, with the reservations, and with what became of the tasks."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from atelier.task.v1 import task_pb2
from atelier.user.v1 import user_pb2 as pb
from sqlalchemy import Update, delete, update

from mesh.errors import PermissionDenied
from services.user import handlers
from services.user.domain import State
from services.user.tables import counter, ledger, reservation
from tests.eventually import eventually
from tests.service.user.conftest import Home

RUNNING, FAILED = task_pb2.Task.STATE_RUNNING, task_pb2.Task.STATE_FAILED
SUCCEEDED = task_pb2.Task.STATE_SUCCEEDED
HELD, BOUND, SETTLED, RELEASED = 1, 2, 3, 4  # Reservation.State


async def audited(home: Home) -> tuple[list[pb.AuditQuotasResponse.Drift], dict[str, tuple[int, int]], int]:
    """Return what drifts, what is disputed with where it is and should be, and how many reservations were looked at."""
    drifts, disputes, count, request = [], {}, 0, pb.AuditQuotasRequest()
    while True:
        page = await home.stub("usr_root", "ROLE_ADMIN").AuditQuotas(request)
        drifts += page.drifts
        disputes |= {each.reservation_id: (each.state, each.wanted_state) for each in page.disputes}
        count += page.reservation_count
        if not page.next_page_token:
            return drifts, disputes, count
        request.page_token = page.next_page_token


async def reserved(home: Home, task_id: str, state: State, task: int | None, *, round_: int = 1) -> None:
    """Have a reservation stand at `state`, and its task at `task`."""
    user = await home.accounts.find("ada") or await home.registered()
    await home.reserve(user.user_id, f"{task_id}/1")
    await home.quotas.move(f"{task_id}/1", state, home.clock.now())
    if task is not None:
        home.tasks.known[task_id] = task_pb2.LookupTaskResponse(state=task, reservation_id=f"{task_id}/{round_}")


@pytest.fixture(autouse=True)
def pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is disputed be looked at again soon, but late enough for a test to change it meanwhile."""
    monkeypatch.setattr(handlers, "LOOK_AGAIN_SECONDS", 0.5)


async def changed(home: Home, *statements: Update) -> None:
    async with home.sql.transaction() as connection:
        for statement in statements:
            await connection.execute(statement)


async def test_what_agrees_is_all_well(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "AUDITED_AT_ONCE", 2)
    await reserved(home, "tsk_running", State.BOUND, RUNNING)
    await reserved(home, "tsk_fresh", State.HELD, RUNNING)
    await reserved(home, "tsk_done", State.SETTLED, SUCCEEDED)
    await reserved(home, "tsk_broken", State.RELEASED, FAILED)
    await reserved(home, "tsk_cut", State.SETTLED, None)
    await reserved(home, "tsk_retried", State.RELEASED, RUNNING, round_=2)
    user = await home.accounts.find("ada")
    await home.reserve(user.user_id, "fil_1", 7, storage=True)
    home.clock.time += timedelta(minutes=3)

    assert await audited(home) == ([], {}, 6)


async def test_reservations_that_are_not_as_their_tasks_are_disputed(home: Home) -> None:
    await reserved(home, "tsk_uncharged", State.BOUND, SUCCEEDED)
    await reserved(home, "tsk_kept", State.BOUND, FAILED)
    await reserved(home, "tsk_charged", State.SETTLED, FAILED)
    await reserved(home, "tsk_free", State.RELEASED, SUCCEEDED)
    await reserved(home, "tsk_gone", State.HELD, None)

    _, young, _ = await audited(home)
    home.clock.time += timedelta(minutes=3)
    drifts, disputes, _ = await audited(home)

    assert "tsk_gone/1" not in young  # its task may be about to be stored
    assert drifts == []
    assert disputes == {
        "tsk_uncharged/1": (BOUND, SETTLED),
        "tsk_kept/1": (BOUND, RELEASED),
        "tsk_charged/1": (SETTLED, RELEASED),
        "tsk_free/1": (RELEASED, SETTLED),
        "tsk_gone/1": (HELD, RELEASED),
    }


async def test_what_is_put_right_while_it_is_looked_at_is_not_disputed(home: Home) -> None:
    await reserved(home, "tsk_done", State.BOUND, SUCCEEDED)  # its event is on its way
    await reserved(home, "tsk_kept", State.BOUND, FAILED)

    auditing = asyncio.create_task(audited(home))
    await eventually(lambda: home.tasks.asked == 2)
    await home.quotas.move("tsk_done/1", State.SETTLED, home.clock.now())

    assert await auditing == ([], {"tsk_kept/1": (BOUND, RELEASED)}, 2)


async def test_what_is_disputed_is_told_once_though_more_is_reserved_meanwhile(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "AUDITED_AT_ONCE", 1)
    await reserved(home, "tsk_2", State.BOUND, FAILED)

    auditing = asyncio.create_task(audited(home))
    await eventually(lambda: home.tasks.asked == 1)
    await reserved(home, "tsk_1", State.BOUND, RUNNING)

    assert await auditing == ([], {"tsk_2/1": (BOUND, RELEASED)}, 2)


async def test_sums_that_differ_are_told_with_all_three(home: Home) -> None:
    user = await home.registered()
    await home.reserve(user.user_id, "tsk_1/1")
    await home.reserve(user.user_id, "fil_1", 7, storage=True)

    await changed(home, update(counter).where(counter.c.kind == "tasks").values(used=counter.c.used + 2))
    [by_counter], _, _ = await audited(home)
    await changed(home, update(counter).where(counter.c.kind == "tasks").values(used=counter.c.used - 2))
    await changed(home, update(reservation).where(reservation.c.reservation_id == "fil_1").values(amount=8))
    [by_reservation], _, _ = await audited(home)
    await changed(home, update(reservation).where(reservation.c.reservation_id == "fil_1").values(amount=7))
    await changed(home, update(ledger).values(reserved=0))
    by_ledger, _, _ = await audited(home)
    await changed(home, delete(ledger), delete(reservation), delete(counter))  # for the fixture's own audit

    one, none = pb.AuditQuotasResponse.Amounts(reserved=1), pb.AuditQuotasResponse.Amounts(used=2, reserved=1)
    assert (by_counter.user_id, by_counter.metric, by_counter.period) == (user.user_id, "tasks", "2026-10")
    assert (by_counter.counter, by_counter.ledger, by_counter.reservations) == (none, one, one)
    assert (by_reservation.metric, by_reservation.ledger.reserved, by_reservation.reservations.reserved) == (
        "storage_bytes",
        7,
        8,
    )
    assert {each.metric for each in by_ledger} == {"tasks", "storage_bytes"}


async def test_only_administrators_may(home: Home) -> None:
    with pytest.raises(PermissionDenied):
        await home.stub("usr_1").AuditQuotas(pb.AuditQuotasRequest())
