from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from services.user.domain import (
    GIB,
    Account,
    EtagMismatch,
    Kind,
    PasswordTooWeak,
    PermissionUnknown,
    Reservation,
    ReservationNotFound,
    ReservationReleased,
    Role,
    State,
    Status,
    Usage,
    allowed,
    exceeded,
    moved,
    period,
    require_charged,
    require_etag,
    require_strong,
    reset_time,
    succeeded,
)

NOW = datetime(2026, 10, 31, 23, 59, 30, tzinfo=UTC)


def account(**changes):
    return Account(
        **{"user_id": "usr_1", "username": "ada", "email": "a@example.com", "password_hash": "", "create_time": NOW}
        | changes
    )


def reservation(state, kind=Kind.TASKS, amount=3):
    return Reservation("tsk_1/1", "usr_1", kind, period(kind, NOW), amount, state)


@pytest.mark.parametrize("password", ["Ada.Lovelace", "ada@example.com", "ADA@example.com", "aaaaaaaa", "aAaAaAaA"])
def test_a_password_that_is_guessed_first_is_refused(password):
    with pytest.raises(PasswordTooWeak) as refusal:
        require_strong(password, username="ada.lovelace", email="ada@example.com")

    assert "password" in refusal.value.violations


def test_another_password_is_taken():
    require_strong("ada.lovelace2", username="ada.lovelace", email="ada@example.com")


def test_limits_are_the_role_s():
    assert account().limit(Kind.TASKS) == 100
    assert account(role=Role.VIP).limit(Kind.STORAGE_BYTES) == 100 * GIB
    assert account(role=Role.ADMIN).limit(Kind.TASKS) == 5_000


def test_own_limits_go_before_the_role_s_even_when_they_are_zero():
    own = account(limits={Kind.TASKS: 0})

    assert own.limit(Kind.TASKS) == 0
    assert own.limit(Kind.STORAGE_BYTES) == GIB


def test_only_administrators_administer():
    assert allowed(account(role=Role.ADMIN), "users.administer")
    assert not allowed(account(role=Role.VIP), "users.administer")


def test_a_disabled_account_may_nothing():
    assert not allowed(account(role=Role.ADMIN, status=Status.DISABLED), "tasks.create")


def test_a_permission_that_nobody_defined_is_refused():
    with pytest.raises(PermissionUnknown) as refusal:
        allowed(account(), "moon.land")

    assert refusal.value.metadata["permission"] == "moon.land"


def test_an_old_etag_is_refused():
    with pytest.raises(EtagMismatch) as refusal:
        require_etag(account(version=3), "2")

    assert refusal.value.metadata["etag"] == "3"


def test_tasks_count_in_the_month_of_utc():
    in_november_already = NOW.astimezone(timezone(timedelta(hours=2)))

    assert period(Kind.TASKS, in_november_already) == "2026-10"


def test_storage_has_no_months():
    assert period(Kind.STORAGE_BYTES, NOW) == ""


@pytest.mark.parametrize(
    ("now", "reset"),
    [
        (NOW, datetime(2026, 11, 1, tzinfo=UTC)),
        (datetime(2026, 12, 5, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (datetime(2028, 1, 31, tzinfo=UTC), datetime(2028, 2, 1, tzinfo=UTC)),
    ],
)
def test_counting_begins_anew_with_the_next_month(now, reset):
    assert reset_time(now) == reset


def test_a_refusal_of_tasks_says_what_is_used_and_when_to_come_back():
    refusal = exceeded(account(), Kind.TASKS, Usage(used=100), 1, NOW)

    assert refusal.metadata == {"metric": "tasks", "limit": "100", "used": "100", "requested": "1"}
    assert refusal.retry_after_seconds == 30


def test_whoever_asks_for_a_whole_month_s_may_come_back_with_the_next() -> None:
    assert exceeded(account(), Kind.TASKS, Usage(used=1), 100, NOW).retry_after_seconds == 30


@pytest.mark.parametrize(("usage", "amount"), [(Usage(used=90, reserved=10), 1), (Usage(reserved=1), 100)])
def test_whoever_is_refused_for_what_is_only_set_aside_may_come_back_soon(usage, amount):
    assert exceeded(account(), Kind.TASKS, usage, amount, NOW).retry_after_seconds == 1


def test_what_is_set_aside_does_not_stand_in_the_way_of_what_would_not_fit_without_it():
    assert exceeded(account(), Kind.TASKS, Usage(used=99, reserved=1), 2, NOW).retry_after_seconds == 30


def test_waiting_does_not_free_storage():
    assert exceeded(account(), Kind.STORAGE_BYTES, Usage(), 2 * GIB, NOW).retry_after_seconds is None


def test_waiting_does_not_help_whoever_asks_for_more_than_a_month_has() -> None:
    assert exceeded(account(), Kind.TASKS, Usage(), 101, NOW).retry_after_seconds is None


@pytest.mark.parametrize("state", [State.HELD, State.BOUND])
def test_settling_charges_what_was_set_aside(state):
    move = moved(reservation(state), State.SETTLED)

    assert (move.state, move.used, move.reserved) == (State.SETTLED, 3, -3)


@pytest.mark.parametrize("state", [State.HELD, State.BOUND])
def test_releasing_gives_back_what_was_set_aside(state):
    move = moved(reservation(state), State.RELEASED)

    assert (move.state, move.used, move.reserved) == (State.RELEASED, 0, -3)


def test_binding_changes_no_counter():
    move = moved(reservation(State.HELD), State.BOUND)

    assert (move.state, move.used, move.reserved) == (State.BOUND, 0, 0)


@pytest.mark.parametrize("state", [State.SETTLED, State.RELEASED])
@pytest.mark.parametrize("target", [State.BOUND, State.SETTLED, State.RELEASED])
def test_what_has_ended_for_a_task_stays(state, target):
    assert moved(reservation(state), target) is None


def test_deleting_a_file_gives_its_charge_back():
    move = moved(reservation(State.SETTLED, Kind.STORAGE_BYTES), State.RELEASED)

    assert (move.state, move.used, move.reserved) == (State.RELEASED, -3, 0)


def test_what_was_given_back_is_not_called_charged():
    with pytest.raises(ReservationReleased) as refusal:
        require_charged("tsk_1/1", reservation(State.RELEASED))

    assert refusal.value.metadata["reservation_id"] == "tsk_1/1"


def test_what_never_was_is_not_called_charged():
    with pytest.raises(ReservationNotFound):
        require_charged("tsk_1/1", None)


@pytest.mark.parametrize("changed", [{"role": Role.VIP}, {"status": Status.DISABLED}], ids=str)
def test_a_change_of_role_or_status_begins_a_generation(changed):
    present = account(version=3, generation=2)

    after = succeeded(present, replace(present, **changed))

    assert (after.version, after.generation_id) == (4, f"{present.user_id}/3")


def test_another_change_stays_in_its_generation():
    present = account(version=3, generation=2)

    after = succeeded(present, replace(present, display_name="Ada"))

    assert (after.version, after.generation) == (4, 2)
