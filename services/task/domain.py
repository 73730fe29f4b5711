"""What a task is and what may become of it. No I/O, no protobuf: an operation is opaque bytes here.

    QUEUED ──claimed──► RUNNING ──completed──► SUCCEEDED
      ▲ ▲                 │ │ └───failed────► FAILED ────┐
      │ └─failed, lapsed,─┘ └───cancelled───► CANCELLED ─┤
      │   returned                 (also from QUEUED)    │
      └──────────────────────retried─────────────────────┘

A step is a pure function of a task and the time; it answers a `Change`, or the same task when there is nothing to do.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

from mesh.errors import Aborted, FailedPrecondition, InvalidArgument, MeshError, NotFound, Unavailable

SUPPORTED_INPUTS = (
    "image/avif",
    "image/gif",
    "image/jpeg",
    "image/png",
    "image/tiff",
    "image/webp",
)
FORGET = "forget"  # the work that one replica does for all: the name of its lock and of its fence
PERMITS = 32  # of a batch, or for those that wait: so many workers are woken at a time
POOLS = ("cpu", "gpu")  # of workers, the least demanding first: what needs several goes to the last of them
ROUNDS = 100  # of a task: cancelling and retrying costs no quota, and a watch reads all that ever happened
RESERVATION_AGE = timedelta(seconds=60)  # the user service gives back what is older than two minutes and has no task
# A turn of weight 1 is as long as the largest weight, so that everybody's is a whole number; decision 0019.
WEIGHTS = {"ROLE_USER": 1, "ROLE_VIP": 4, "ROLE_ADMIN": 4}
LONGEST_TURN = 4
CODE_DEADLINE_EXCEEDED, CODE_UNAVAILABLE = 4, 14  # google.rpc.Code


class TaskNotFound(NotFound):
    reason = "TASK_NOT_FOUND"


class TaskBatchNotFound(NotFound):
    reason = "TASK_BATCH_NOT_FOUND"


class TaskEnded(FailedPrecondition):
    reason = "TASK_ENDED"


class TaskNotRetryable(FailedPrecondition):
    reason = "TASK_NOT_RETRYABLE"


class TaskRetriedTooOften(FailedPrecondition):
    reason = "TASK_RETRIED_TOO_OFTEN"


class TaskNotDead(FailedPrecondition):
    reason = "TASK_NOT_DEAD"


class RedriveOfWhat(InvalidArgument):
    reason = "REDRIVE_OF_WHAT"


class LeaseLost(Aborted):
    reason = "LEASE_LOST"


class InputUnsupported(InvalidArgument):
    reason = "INPUT_UNSUPPORTED"


class ReservationTooOld(Unavailable):
    reason = "RESERVATION_TOO_OLD"


class State(enum.StrEnum):
    """Where a task stands."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether no worker will touch the task unless its owner retries it."""
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a task is; `fraction` in 0..1."""

    fraction: float
    stage: str


WAITING = Progress(0.0, "queued")
UNSERVED = Progress(0.0, "waiting for a worker")
STARTED = Progress(0.0, "download")
DONE = Progress(1.0, "done")


Version = tuple[int, Progress]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended badly; `code` is a google.rpc.Code, `reason` is for programs."""

    code: int
    message: str
    reason: str


WORKER_LOST = Failure(CODE_UNAVAILABLE, "The worker that had the task was lost.", "WORKER_LOST")
TOO_LATE = Failure(CODE_DEADLINE_EXCEEDED, "The task did not end before its deadline.", "TASK_DEADLINE_EXCEEDED")


@dataclass(frozen=True, slots=True)
class Task:
    """One operation on one file, and what became of it."""

    task_id: str
    user_id: str
    role: str
    """Its owner's when it was queued, as the access token said; weighs its turns."""
    pool: str
    turn: int
    """Its place in the pool: of those that are due, the least is claimed first. Kept until its owner retries it."""
    input_file_id: str
    file_ids: tuple[str, ...]
    """Every file that the operation reads, the input among them."""
    operation: bytes
    state: State
    sequence: int
    """Of its newest event; 1 is its creation."""
    round: int
    """How often it was queued by its owner; names the reservation that stands for it. Grows with a retry."""
    attempt: int
    """How often it was claimed, ever: the fencing token. Never shrinks and is never used twice."""
    failures: int
    """Attempts of this round that count against `Terms.attempts`."""
    progress: Progress
    output_file_ids: tuple[str, ...]
    failure: Failure | None
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    update_time: datetime
    due_time: datetime
    """When a queued task may be claimed."""
    lease_time: datetime | None
    """When a running task's lease lapses."""
    deadline: timedelta | None
    """How long its owner gives each round."""
    deadline_time: datetime | None
    """When the present round's time is over."""
    batch_id: str | None
    """What it was created with, if not alone."""
    request_id: str
    """Of the call that queued it."""
    trace_id: str
    """Of that call; empty when it had none."""
    dead_time: datetime | None
    """When it used up its attempts on what might have passed: since then it is a dead letter."""
    webhook_url: str | None
    """What hears of its ends; None for its owner's."""

    @property
    def reservation_id(self) -> str:
        """Name of what is set aside for it in the user service."""
        return reservation_id(self.task_id, self.round)

    @property
    def version(self) -> Version:
        """Differs after every change that an owner can see."""
        return self.sequence, self.progress


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks that were created in one call, and how far they are together."""

    batch_id: str
    user_id: str
    create_time: datetime
    size: int
    states: Mapping[State, int]
    """How many of them are where; a state that none is in may lack."""
    fraction: float
    """The mean of theirs, where one that has ended counts as 1."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a task's state, and what it left behind."""

    sequence: int
    state: State
    attempt: int
    reason: str
    """Why, for a failure or a return to the queue."""
    failure: Failure | None
    """What the task showed its owner after it."""
    create_time: datetime


@dataclass(frozen=True, slots=True)
class TaskCreated:
    """It was queued by its owner, for the first time or again."""

    task: Task


@dataclass(frozen=True, slots=True)
class TaskSucceeded:
    """It ended well."""

    task: Task


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """It ended badly."""

    task: Task


@dataclass(frozen=True, slots=True)
class TaskCancelled:
    """Its owner did not want it any more."""

    task: Task


@dataclass(frozen=True, slots=True)
class Permit:
    """Has a worker that rests claim from a pool, not necessarily this task, until the pool has no more for it."""

    task: Task


Notice = TaskCreated | TaskSucceeded | TaskFailed | TaskCancelled | Permit


@dataclass(frozen=True, slots=True)
class Change:
    """A task after a step, why, and who is told."""

    task: Task
    reason: str = ""
    notices: tuple[Notice, ...] = ()


Step = Callable[[Task, datetime], Change]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker is promised and how often a task is tried."""

    lease: timedelta = timedelta(seconds=15)
    slack: timedelta = timedelta(seconds=3)
    """How much longer than promised a lease truly holds, so that not every renewal has to be written."""
    attempts: int = 3
    backoff: timedelta = timedelta(seconds=1)
    """Before the second attempt; doubles with each further one."""
    longest: timedelta = timedelta(hours=1)
    """How long an attempt may use its files; longer than any operation may take."""
    kept: timedelta = timedelta(days=30)
    """How long a task and its history can be read after its end."""
    result_max_bytes: int = 512 * 1024 * 1024  # an uncompressed image of 100 megapixels still fits


@dataclass(frozen=True, slots=True)
class Query:
    """A page of a user's tasks, newest first; `after` is the last page's (create_time, task_id)."""

    user_id: str
    state: State | None
    batch_id: str | None
    after: tuple[datetime, str] | None
    size: int


@dataclass(frozen=True, slots=True)
class DeadQuery:
    """A page of dead letters, oldest first; `after` is the last page's (dead_time, task_id)."""

    reason: str | None
    after: tuple[datetime, str] | None
    size: int


@dataclass(frozen=True, slots=True)
class Page:
    """Some tasks, and whether more follow."""

    tasks: list[Task]
    more: bool


@dataclass(frozen=True, slots=True)
class EventQuery:
    """A page of a task's events, oldest first; `after` is the last page's sequence, 0 for the first page."""

    task_id: str
    after: int
    size: int


@dataclass(frozen=True, slots=True)
class EventPage:
    """Some events, and whether more follow."""

    events: list[Event]
    more: bool


@dataclass(frozen=True, slots=True)
class History:
    """A task and all its events, oldest first."""

    task: Task
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """A task that is not as its events say."""

    task_id: str
    fields: tuple[str, ...]
    """What differs; empty when the whole task is missing."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Some tasks, rebuilt from their events and compared."""

    replayed: int
    incomplete: int
    """How many more could not be: they have no events, or their first ones are from before these held all facts."""
    discrepancies: list[Discrepancy]
    last: str | None
    """The last task's id; None when no more follow."""


class Tasks(Protocol):
    """Where tasks are kept. Every `now` that a step sees is the database's."""

    async def adopt(self, user_id: str, method: str, key: str, fingerprint: bytes, new_id: str) -> tuple[str, bool]:
        """Return the id that the first call of `method` with `key` was given, and whether this is the first.

        Raises:
            IdempotencyKeyReused: the first one asked for something else.
        """

    async def add(self, task_id: str, created: Callable[[datetime], Change]) -> Task:
        """Store what `created` makes, or return the task that is there already."""

    async def add_batch(self, batch_id: str, created: Callable[[datetime], Sequence[Change]]) -> Batch:
        """Store what `created` makes, tasks of one owner, all or none; or return the batch that is there already."""

    async def change_batch(self, batch_id: str, step: Step, *, owner: str) -> Batch:
        """Take a step with each task of a batch, all or none.

        Raises:
            TaskBatchNotFound: there is none of this owner.
        """

    async def find_batch(self, batch_id: str) -> Batch | None:
        """Return a batch, whoever's it is; None when there is none."""

    async def change(self, task_id: str, step: Step, *, owner: str | None = None) -> Task:
        """Take a step. With an owner, another's task is not found; without, others' steps may be taken with it.

        Raises:
            TaskNotFound: there is none.
        """

    async def claim(self, pool: str, count: int, step: Step) -> Page:
        """Take `step` with the next tasks of a pool, up to `count`; none when nothing is due."""

    async def find(self, task_id: str) -> Task | None:
        """Return a task, whoever's it is; None when there is none."""

    async def page(self, query: Query) -> Page:
        """Return one page."""

    async def dead(self, query: DeadQuery) -> Page:
        """Return one page of the dead letters."""

    async def events(self, query: EventQuery) -> EventPage:
        """Return one page of a task's events."""

    async def histories(self, task_ids: Sequence[str]) -> list[History]:
        """Return those of the tasks that exist, each with all its events, as of one moment."""

    async def replay(self, after: str, at_most: int, *, rebuild: bool) -> Replay:
        """Rebuild from their events the tasks whose ids follow `after`, and compare; `rebuild` mends what differs.

        A running task's progress and lease are no events: where it differs otherwise, they begin anew.
        """

    async def versions(self, task_ids: Sequence[str]) -> dict[str, Version]:
        """Return the versions of those of the tasks that exist."""

    async def lapsed(self, limit: int) -> list[str]:
        """Return running tasks whose lease has lapsed, the longest lapsed first."""

    async def late(self, limit: int) -> list[str]:
        """Return tasks that have not ended though their deadline has passed, the longest passed first."""

    async def overdue(self, pool: str, waited: timedelta) -> int:
        """Count the tasks of a pool that could have been claimed for at least `waited`."""

    async def cut(self, kept: timedelta, at_most: int, fence: int) -> int:
        """Delete tasks that ended longer ago than `kept`, with their events; return how many, `at_most` at a time.

        `fence` is of the work FORGET.
        """

    async def forget(self, fence: int) -> None:
        """Delete idempotency keys that are too old to be repeated; `fence` is of the work FORGET."""


def reservation_id(task_id: str, round_: int) -> str:
    """Return the name of a round's reservation in the user service."""
    return f"{task_id}/{round_}"


def require_supported(file_id: str, content_type: str) -> None:
    """Refuse a file that no worker can read.

    Raises:
        InputUnsupported: it is not an image of a supported format.
    """
    if content_type not in SUPPORTED_INPUTS:
        supported = ", ".join(SUPPORTED_INPUTS)
        raise InputUnsupported(
            f"The file {file_id} is {content_type}; supported are {supported}.",
            metadata={"file_id": file_id, "content_type": content_type, "supported": supported},
        )


def require_fresh(reserved_time: datetime, now: datetime) -> None:
    """Refuse to commit on a reservation that the user service may soon take for forgotten.

    Raises:
        ReservationTooOld: it is older than a minute.
    """
    if now - reserved_time > RESERVATION_AGE:
        raise ReservationTooOld("Queueing the task took too long. Try again.", retry_after_seconds=1)


def require_found(task: Task | None, task_id: str, owner: str | None = None) -> Task:
    """Return `task`.

    Raises:
        TaskNotFound: there is none, or it is not the owner's.
    """
    if task is None or owner not in (None, task.user_id):
        raise TaskNotFound(f"There is no task {task_id}.", metadata={"task_id": task_id})
    return task


def require_batch(batch: Batch | None, batch_id: str, owner: str) -> Batch:
    """Return `batch`.

    Raises:
        TaskBatchNotFound: there is none, or it is not the owner's.
    """
    if batch is None or batch.user_id != owner:
        raise TaskBatchNotFound(f"There is no batch {batch_id}.", metadata={"batch_id": batch_id})
    return batch


def blamed(error: MeshError, index: int) -> MeshError:
    """Return why a batch is refused, with the item that is to blame: what is wrong with its file."""
    error.message = f"items[{index}]: {error.message}"
    error.metadata["index"] = str(index)
    error.violations[f"items[{index}].inputFileId"] = error.message
    return error


def require_retryable(task: Task) -> None:
    """Refuse to queue a task again that did not end badly.

    Raises:
        TaskNotRetryable: it has not ended, or ended well.
    """
    if task.state not in (State.FAILED, State.CANCELLED):
        raise TaskNotRetryable(
            f"The task {task.task_id} is {task.state}; only FAILED and CANCELLED ones can be retried.",
            metadata={"task_id": task.task_id, "state": task.state},
        )


def require_rounds(task: Task) -> None:
    """Refuse to queue a task once more for its owner after so many times.

    Raises:
        TaskRetriedTooOften: it has had all its rounds.
    """
    if task.round >= ROUNDS:
        raise TaskRetriedTooOften(
            f"The task {task.task_id} was queued {task.round} times, which is the most. Create a new one.",
            metadata={"task_id": task.task_id, "rounds": str(ROUNDS)},
        )


def require_either(task_ids: Sequence[str], reason: str) -> None:
    """Refuse to redrive what is named in two ways, or not at all.

    Raises:
        RedriveOfWhat: give tasks, or a reason.
    """
    if bool(task_ids) == bool(reason):
        raise RedriveOfWhat("Give either taskIds or a reason.", metadata={"fields": "taskIds, reason"})


def require_dead(task: Task) -> None:
    """Refuse to redrive a task that is no dead letter.

    Raises:
        TaskNotDead: it has attempts left, ended otherwise, or was queued again already.
    """
    if task.dead_time is None:
        raise TaskNotDead(
            f"The task {task.task_id} is no dead letter: it is {task.state}.",
            metadata={"task_id": task.task_id, "state": task.state},
        )


def created(
    now: datetime,
    *,
    task_id: str,
    user_id: str,
    role: str,
    input_file_id: str,
    file_ids: Sequence[str],
    operation: bytes,
    deadline: timedelta | None = None,
    batch_id: str | None = None,
    request_id: str = "",
    trace_id: str = "",
    webhook_url: str | None = None,
    permitted: bool = True,
    pool: str = POOLS[0],
) -> Change:
    """Make a task, with a permit or without. It reads `file_ids`, the input among them; its turn is given later."""
    task = Task(
        task_id=task_id,
        user_id=user_id,
        role=role,
        pool=pool,
        turn=0,
        input_file_id=input_file_id,
        file_ids=tuple(file_ids),
        operation=operation,
        state=State.QUEUED,
        sequence=1,
        round=1,
        attempt=0,
        failures=0,
        progress=WAITING,
        output_file_ids=(),
        failure=None,
        create_time=now,
        start_time=None,
        end_time=None,
        update_time=now,
        due_time=now,
        lease_time=None,
        deadline=deadline,
        deadline_time=_later(now, deadline),
        batch_id=batch_id,
        request_id=request_id,
        trace_id=trace_id,
        dead_time=None,
        webhook_url=webhook_url,
    )
    return Change(task, notices=(TaskCreated(task), Permit(task)) if permitted else (TaskCreated(task),))


def claimed(task: Task, now: datetime, *, terms: Terms) -> Change:
    """Give a queued task to a worker."""
    return Change(
        replace(
            task,
            state=State.RUNNING,
            sequence=task.sequence + 1,
            attempt=task.attempt + 1,
            progress=STARTED,
            start_time=now,
            update_time=now,
            lease_time=now + terms.lease + terms.slack,
        )
    )


def renewed(task: Task, now: datetime, *, attempt: int, progress: Progress | None, terms: Terms) -> Change:
    """Prolong a lease, where it would not hold as long as is promised, and note progress, which never goes back.

    Raises:
        LeaseLost: the task is no longer this attempt's.
    """
    _require_held(task, attempt)
    assert task.lease_time is not None  # noqa: S101 - every running task has one
    if task.lease_time < now + terms.lease:
        task = replace(task, lease_time=now + terms.lease + terms.slack)
    if progress is not None and progress != task.progress and task.progress.fraction <= progress.fraction <= 1:
        task = replace(task, progress=progress, update_time=now)
    return Change(task)


def completed(task: Task, now: datetime, *, attempt: int, output_file_ids: Sequence[str]) -> Change:
    """End a task well. The newest attempt counts, even when its lease has lapsed and nobody noticed.

    Raises:
        LeaseLost: the task is no longer this attempt's, or ended with other files.
    """
    outputs = tuple(output_file_ids)
    if (task.state, task.attempt, task.output_file_ids) == (State.SUCCEEDED, attempt, outputs):
        return Change(task)
    _require_held(task, attempt)
    done = replace(_ended(task, State.SUCCEEDED, now), progress=DONE, output_file_ids=outputs)
    return Change(done, notices=(TaskSucceeded(done),))


def failed(
    task: Task, now: datetime, *, attempt: int, failure: Failure, transient: bool, terms: Terms, jitter: float
) -> Change:
    """End an attempt badly: the task goes out again later if the failure may pass and attempts are left.

    Raises:
        LeaseLost: the task is no longer this attempt's.
    """
    if task.attempt == attempt and task.state in (State.QUEUED, State.FAILED):
        return Change(task)  # a repeated report: the first one was taken
    _require_held(task, attempt)
    return _attempt_failed(task, now, failure=failure, transient=transient, terms=terms, jitter=jitter)


def returned(task: Task, now: datetime, *, attempt: int, failure: Failure) -> Change:
    """Put a task back that a stopping worker could not finish; the attempt is not counted.

    Raises:
        LeaseLost: the task is no longer this attempt's.
    """
    if task.attempt == attempt and task.state is State.QUEUED:
        return Change(task)
    _require_held(task, attempt)
    waiting = _requeued(task, now, due_time=now)
    return Change(waiting, reason=failure.reason or "RETURNED", notices=(Permit(waiting),))


def lapsed(task: Task, now: datetime, *, terms: Terms, jitter: float) -> Change:
    """Take a running task from a worker that has not renewed its lease in time."""
    if task.state is not State.RUNNING or task.lease_time is None or task.lease_time >= now:
        return Change(task)  # it was renewed, or ended, since somebody looked
    return _attempt_failed(task, now, failure=WORKER_LOST, transient=True, terms=terms, jitter=jitter)


def overran(task: Task, now: datetime) -> Change:
    """Fail a task that has not ended by its deadline; its worker learns it as it learns of a cancellation."""
    if task.state.ended or task.deadline_time is None or task.deadline_time >= now:
        return Change(task)  # it ended, or was retried, since somebody looked
    dead = replace(_ended(task, State.FAILED, now), failure=TOO_LATE)
    return Change(dead, reason=TOO_LATE.reason, notices=(TaskFailed(dead),))


def cancelled(task: Task, now: datetime) -> Change:
    """Stop a task. A cancelled one stays as it is.

    Raises:
        TaskEnded: it has ended otherwise.
    """
    if task.state is State.CANCELLED:
        return Change(task)
    if task.state.ended:
        raise TaskEnded(
            f"The task {task.task_id} has ended already: it is {task.state}.",
            metadata={"task_id": task.task_id, "state": task.state},
        )
    unwanted = _ended(task, State.CANCELLED, now)
    return Change(unwanted, notices=(TaskCancelled(unwanted),))


def stopped(task: Task, now: datetime) -> Change:
    """Cancel a task, as part of many, unless it has ended."""
    return Change(task) if task.state.ended else cancelled(task, now)


def retried(task: Task, now: datetime, *, round_: int, role: str, reason: str = "RETRIED") -> Change:
    """Queue a task again that ended badly, with fresh attempts. It waits for a new turn, weighed by `role`.

    Raises:
        TaskNotRetryable: it did not end badly, or was retried since `round_` was reserved.
    """
    require_retryable(task)
    if round_ <= task.round:
        raise TaskNotRetryable(
            f"The task {task.task_id} was retried by another call.",
            metadata={"task_id": task.task_id, "state": task.state},
        )
    waiting = replace(
        _requeued(task, now, due_time=now),
        role=role,
        round=round_,
        failures=0,
        failure=None,
        dead_time=None,
        start_time=None,
        end_time=None,
        deadline_time=_later(now, task.deadline),
    )
    return Change(waiting, reason=reason, notices=(TaskCreated(waiting), Permit(waiting)))


def turns(role: str, *, present: int, last: int | None, count: int = 1) -> list[int]:
    """Return the turns of `count` tasks that a user queues now (start-time fair queueing; decision 0019).

    Args:
        role: weighs them.
        present: the turn that the pool has come to.
        last: the latest turn among the user's tasks that have not ended; None when all have.
        count: > 0.
    """
    length = LONGEST_TURN // WEIGHTS.get(role, 1)
    first = present if last is None else max(present, last + length)
    return [first + length * number for number in range(count)]


def backoff(failures: int, *, terms: Terms, jitter: float) -> timedelta:
    """Return how long a task rests after its `failures`-th failure, > 0.

    Args:
        failures: > 0.
        terms: holds the first rest.
        jitter: 0..1; spreads tasks which failed together over half to one and a half times the rest.
    """
    return terms.backoff * (2.0 ** (failures - 1) * (0.5 + jitter))


def replayed(history: History) -> list[Task]:
    """Return the task as it was after each of its events; the last one is the task itself.

    Progress and the files of an ended task are not kept by event: an earlier state shows the progress it began with.
    """
    task = replace(history.task, progress=WAITING, start_time=None)
    began = {State.QUEUED: WAITING, State.RUNNING: STARTED}
    seen = []
    for event in history.events[:-1]:
        last_start = None if task.state.ended else task.start_time  # a retry forgets it
        task = replace(
            task,
            state=event.state,
            sequence=event.sequence,
            attempt=event.attempt,
            progress=began.get(event.state, task.progress),
            output_file_ids=(),
            failure=event.failure,
            start_time=event.create_time if event.state is State.RUNNING else last_start,
            end_time=event.create_time if event.state.ended else None,
            update_time=event.create_time,
        )
        seen.append(task)
    return [*seen, history.task]


def _require_held(task: Task, attempt: int) -> None:
    if task.state is not State.RUNNING or task.attempt != attempt:
        raise LeaseLost(
            f"Attempt {attempt} no longer has the task {task.task_id}: it is {task.state} at attempt {task.attempt}.",
            metadata={
                "task_id": task.task_id,
                "attempt": str(attempt),
                "state": task.state,
                "newest_attempt": str(task.attempt),
            },
        )


def _attempt_failed(
    task: Task, now: datetime, *, failure: Failure, transient: bool, terms: Terms, jitter: float
) -> Change:
    task = replace(task, failures=task.failures + 1)
    if transient and task.failures < terms.attempts:
        rest = backoff(task.failures, terms=terms, jitter=jitter)
        # No permit yet: upkeep sends one when the rest is over.
        return Change(_requeued(task, now, due_time=now + rest), reason=failure.reason)
    dead = replace(_ended(task, State.FAILED, now), failure=failure, dead_time=now if transient else None)
    return Change(dead, reason=failure.reason, notices=(TaskFailed(dead),))


def _later(now: datetime, duration: timedelta | None) -> datetime | None:
    return None if duration is None else now + duration


def _requeued(task: Task, now: datetime, *, due_time: datetime) -> Task:
    return replace(
        task,
        state=State.QUEUED,
        sequence=task.sequence + 1,
        progress=WAITING,
        update_time=now,
        due_time=due_time,
        lease_time=None,
    )


def _ended(task: Task, state: State, now: datetime) -> Task:
    return replace(task, state=state, sequence=task.sequence + 1, end_time=now, update_time=now, lease_time=None)
