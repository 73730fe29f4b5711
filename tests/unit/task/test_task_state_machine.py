"""What may become of a task."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from operator import attrgetter

import pytest

from services.task import domain
from services.task.domain import (
    Change,
    Event,
    Failure,
    History,
    LeaseLost,
    Permit,
    Progress,
    State,
    Task,
    TaskCancelled,
    TaskCreated,
    TaskEnded,
    TaskFailed,
    TaskNotRetryable,
    TaskSucceeded,
    Terms,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
TERMS = Terms()
MINUTE = timedelta(minutes=1)
DAMAGED = Failure(3, "The image is damaged.", "INPUT_DAMAGED")


def queued(deadline: timedelta | None = None) -> Task:
    return domain.created(
        NOW,
        task_id="tsk_1",
        user_id="usr_1",
        role="ROLE_USER",
        input_file_id="fil_1",
        file_ids=("fil_1", "fil_2"),
        operation=b"op",
        deadline=deadline,
    ).task


def running() -> Task:
    return domain.claimed(queued(), NOW, terms=TERMS).task


def succeeded() -> Task:
    return domain.completed(running(), NOW, attempt=1, output_file_ids=["fil_9"]).task


def failed(*, transient: bool = False, task: Task | None = None) -> Change:
    task = task or running()
    return domain.failed(task, NOW, attempt=task.attempt, failure=DAMAGED, transient=transient, terms=TERMS, jitter=0.5)


def cancelled() -> Task:
    return domain.cancelled(queued(), NOW).task


def kinds(change: Change) -> list[type]:
    return [type(notice) for notice in change.notices]


def test_a_new_task_waits_and_sends_its_event_and_a_permit():
    change = domain.created(
        NOW,
        task_id="tsk_1",
        user_id="usr_1",
        role="ROLE_USER",
        input_file_id="fil_1",
        file_ids=("fil_1",),
        operation=b"op",
    )

    assert (change.task.state, change.task.attempt, change.task.sequence) == (State.QUEUED, 0, 1)
    assert change.task.reservation_id == "tsk_1/1"
    assert kinds(change) == [TaskCreated, Permit]


def test_a_claim_begins_an_attempt_under_a_lease():
    task = domain.claimed(queued(), NOW, terms=TERMS).task

    assert (task.state, task.attempt, task.start_time) == (State.RUNNING, 1, NOW)
    assert task.lease_time == NOW + TERMS.lease + TERMS.slack


def test_a_renewal_writes_nothing_while_the_lease_holds_as_long_as_promised():
    task = running()

    change = domain.renewed(task, NOW + TERMS.slack, attempt=1, progress=None, terms=TERMS)

    assert change.task == task


def test_a_renewal_prolongs_a_lease_that_would_end_too_early():
    later = NOW + TERMS.slack + timedelta(seconds=1)

    task = domain.renewed(running(), later, attempt=1, progress=None, terms=TERMS).task

    assert task.lease_time == later + TERMS.lease + TERMS.slack
    assert task.version == running().version


@pytest.mark.parametrize("fraction", [0.2, -1.0, 1.5, float("nan")])
def test_progress_never_goes_back_or_out_of_bounds(fraction: float):
    half = replace(running(), progress=Progress(0.5, "process"))

    task = domain.renewed(half, NOW, attempt=1, progress=Progress(fraction, "decode"), terms=TERMS).task

    assert task.progress == Progress(0.5, "process")


def test_progress_is_no_event():
    task = domain.renewed(running(), NOW, attempt=1, progress=Progress(0.5, "process"), terms=TERMS).task

    assert task.progress == Progress(0.5, "process")
    assert task.sequence == running().sequence


def test_a_completion_ends_the_task_well():
    change = domain.completed(running(), NOW, attempt=1, output_file_ids=["fil_9"])

    assert (change.task.state, change.task.output_file_ids) == (State.SUCCEEDED, ("fil_9",))
    assert change.task.progress == Progress(1.0, "done")
    assert kinds(change) == [TaskSucceeded]


def test_a_completion_counts_after_its_lease_when_nobody_has_noticed():
    late = NOW + timedelta(hours=1)

    change = domain.completed(running(), late, attempt=1, output_file_ids=["fil_9"])

    assert change.task.state is State.SUCCEEDED


def test_a_repeated_completion_changes_nothing():
    change = domain.completed(succeeded(), NOW, attempt=1, output_file_ids=["fil_9"])

    assert change == Change(succeeded())


def test_a_completion_with_other_files_is_refused():
    with pytest.raises(LeaseLost) as refusal:
        domain.completed(succeeded(), NOW, attempt=1, output_file_ids=["fil_8"])

    assert refusal.value.metadata["task_id"] == "tsk_1"


def test_a_stale_attempt_can_do_nothing():
    second = domain.claimed(failed(transient=True).task, NOW, terms=TERMS).task

    for step in (
        lambda: domain.renewed(second, NOW, attempt=1, progress=None, terms=TERMS),
        lambda: domain.completed(second, NOW, attempt=1, output_file_ids=["fil_9"]),
        lambda: domain.returned(second, NOW, attempt=1, failure=DAMAGED),
        lambda: domain.failed(second, NOW, attempt=1, failure=DAMAGED, transient=True, terms=TERMS, jitter=0),
    ):
        with pytest.raises(LeaseLost) as refusal:
            step()
        assert refusal.value.metadata["attempt"] == "1"


def test_a_permanent_failure_ends_the_task():
    change = failed()

    assert (change.task.state, change.task.failure, change.reason) == (State.FAILED, DAMAGED, "INPUT_DAMAGED")
    assert kinds(change) == [TaskFailed]


def test_a_failure_that_may_pass_sends_the_task_out_again_after_a_rest():
    change = failed(transient=True)

    assert (change.task.state, change.task.failure) == (State.QUEUED, None)
    assert change.task.due_time == NOW + TERMS.backoff
    assert kinds(change) == []  # upkeep's permit comes when the rest is over


def test_the_rest_doubles_and_is_spread():
    assert domain.backoff(2, terms=TERMS, jitter=0.5) == 2 * TERMS.backoff
    assert domain.backoff(1, terms=TERMS, jitter=0.0) == TERMS.backoff / 2
    assert domain.backoff(1, terms=TERMS, jitter=1.0) == TERMS.backoff * 1.5


def test_the_third_failure_that_may_pass_ends_the_task():
    task = queued()
    for _ in range(TERMS.attempts):
        change = failed(transient=True, task=domain.claimed(task, NOW, terms=TERMS).task)
        task = change.task

    assert (task.state, task.attempt, task.dead_time) == (State.FAILED, 3, NOW)
    assert kinds(change) == [TaskFailed]


def test_only_what_used_up_its_attempts_is_a_dead_letter_until_it_is_queued_again():
    last = replace(running(), failures=TERMS.attempts - 1)
    lost = domain.lapsed(last, NOW + MINUTE, terms=TERMS, jitter=0.5).task

    assert lost.dead_time == NOW + MINUTE
    assert failed().task.dead_time is None
    assert domain.retried(lost, NOW, round_=2, role="ROLE_USER").task.dead_time is None


def test_a_returned_task_is_queued_at_once_and_the_attempt_does_not_count():
    task = running()
    for attempt in range(1, 10):
        change = domain.returned(task, NOW, attempt=attempt, failure=DAMAGED)
        task = domain.claimed(change.task, NOW, terms=TERMS).task

    assert kinds(change) == [Permit]
    assert (task.attempt, task.failures) == (10, 0)  # the fencing token grows nevertheless


def test_a_repeated_return_changes_nothing():
    waiting = domain.returned(running(), NOW, attempt=1, failure=DAMAGED).task

    assert domain.returned(waiting, NOW, attempt=1, failure=DAMAGED) == Change(waiting)


def test_a_return_without_a_reason_has_one_in_the_history():
    assert domain.returned(running(), NOW, attempt=1, failure=Failure(14, "", "")).reason == "RETURNED"


def test_a_repeated_failure_report_changes_nothing():
    for reported in (failed(), failed(transient=True)):
        again = domain.failed(reported.task, NOW, attempt=1, failure=DAMAGED, transient=True, terms=TERMS, jitter=0.5)

        assert again == Change(reported.task)


def test_a_lapsed_lease_sends_the_task_out_again():
    change = domain.lapsed(running(), NOW + timedelta(seconds=19), terms=TERMS, jitter=0.5)

    assert (change.task.state, change.task.failures, change.reason) == (State.QUEUED, 1, "WORKER_LOST")


def test_a_lease_that_was_renewed_since_somebody_looked_is_left_alone():
    change = domain.lapsed(running(), NOW + timedelta(seconds=17), terms=TERMS, jitter=0.5)

    assert change == Change(running())


def test_a_task_that_loses_its_last_worker_fails():
    last = replace(running(), failures=TERMS.attempts - 1)

    change = domain.lapsed(last, NOW + timedelta(minutes=1), terms=TERMS, jitter=0.5)

    assert change.task.failure == domain.WORKER_LOST
    assert kinds(change) == [TaskFailed]


LIMITED = queued(MINUTE)


@pytest.mark.parametrize("task", [LIMITED, domain.claimed(LIMITED, NOW, terms=TERMS).task])
def test_a_task_that_has_not_ended_by_its_deadline_fails(task: Task):
    change = domain.overran(task, NOW + MINUTE + timedelta(microseconds=1))

    assert (change.task.state, change.task.failure, change.reason) == (
        State.FAILED,
        domain.TOO_LATE,
        "TASK_DEADLINE_EXCEEDED",
    )
    assert kinds(change) == [TaskFailed]


@pytest.mark.parametrize(("task", "after"), [(LIMITED, MINUTE), (queued(), 99 * MINUTE), (succeeded(), 99 * MINUTE)])
def test_a_task_that_ended_or_has_time_left_is_left_alone(task: Task, after: timedelta):
    assert domain.overran(task, NOW + after) == Change(task)


def test_a_retry_begins_its_time_anew():
    late = domain.overran(LIMITED, NOW + 2 * MINUTE).task

    again = domain.retried(late, NOW + 3 * MINUTE, round_=2, role="ROLE_USER").task

    assert again.deadline_time == NOW + 4 * MINUTE


@pytest.mark.parametrize("task", [queued(), running()])
def test_a_task_that_has_not_ended_can_be_cancelled(task: Task):
    change = domain.cancelled(task, NOW)

    assert (change.task.state, change.task.end_time) == (State.CANCELLED, NOW)
    assert kinds(change) == [TaskCancelled]


def test_cancelling_a_cancelled_task_changes_nothing():
    assert domain.cancelled(cancelled(), NOW) == Change(cancelled())


@pytest.mark.parametrize("task", [succeeded(), failed().task])
def test_a_task_that_ended_otherwise_cannot_be_cancelled(task: Task):
    with pytest.raises(TaskEnded) as refusal:
        domain.cancelled(task, NOW)

    assert refusal.value.metadata["state"] == task.state


@pytest.mark.parametrize("task", [cancelled(), failed().task])
def test_a_task_that_ended_badly_can_be_retried_with_fresh_attempts(task: Task):
    change = domain.retried(task, NOW, round_=2, role="ROLE_USER")

    assert (change.task.state, change.task.failures, change.task.failure) == (State.QUEUED, 0, None)
    assert (change.task.reservation_id, change.task.attempt) == ("tsk_1/2", task.attempt)
    assert kinds(change) == [TaskCreated, Permit]


@pytest.mark.parametrize("task", [queued(), running(), succeeded()])
def test_a_task_that_did_not_end_badly_cannot_be_retried(task: Task):
    with pytest.raises(TaskNotRetryable) as refusal:
        domain.retried(task, NOW, round_=2, role="ROLE_USER")

    assert refusal.value.metadata["state"] == task.state


def test_a_round_that_another_retry_has_used_is_refused():
    again = domain.cancelled(domain.retried(cancelled(), NOW, round_=2, role="ROLE_USER").task, NOW).task

    with pytest.raises(TaskNotRetryable):
        domain.retried(again, NOW, round_=2, role="ROLE_USER")


def test_a_history_is_replayed_state_by_state():
    steps = [Change(queued()), domain.claimed(queued(), NOW, terms=TERMS), failed()]
    steps.append(domain.retried(steps[-1].task, NOW, round_=2, role="ROLE_USER"))
    steps.append(domain.claimed(steps[-1].task, NOW + MINUTE, terms=TERMS))
    steps.append(domain.returned(steps[-1].task, NOW + 2 * MINUTE, attempt=2, failure=DAMAGED))
    steps.append(domain.claimed(steps[-1].task, NOW + 3 * MINUTE, terms=TERMS))
    events = tuple(
        Event(s.task.sequence, s.task.state, s.task.attempt, s.reason, s.task.failure, s.task.update_time)
        for s in steps
    )

    seen = domain.replayed(History(steps[-1].task, events))

    kept = attrgetter("sequence", "state", "attempt", "failure", "start_time", "end_time", "update_time", "progress")
    assert [kept(task) for task in seen] == [kept(step.task) for step in steps]
