"""Tasks between the domain and the wire: resources, events, permits, cursors. Pure."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from atelier.media.v1 import media_pb2
from atelier.policy.v1 import policy_pb2
from atelier.task.v1 import events_pb2, webhook_pb2
from atelier.task.v1 import task_pb2 as pb
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as Proto
from google.rpc import status_pb2

from mesh import events, paging, status
from mesh.errors import InvalidArgument, MeshError
from mesh.outbox import Message
from mesh.wire import timestamp
from services.task.domain import (
    POOLS,
    Batch,
    DeadQuery,
    Event,
    EventPage,
    EventQuery,
    Failure,
    Notice,
    Page,
    Permit,
    Progress,
    Query,
    Replay,
    State,
    Task,
    TaskCancelled,
    TaskCreated,
    TaskFailed,
    TaskSucceeded,
)
from services.task.webhooks import Delivery, DeliveryPage, DeliveryQuery, DeliveryState, Webhook

SOURCE = "task"  # CloudEvents: who says so
ENDS = {
    State.SUCCEEDED: events_pb2.TaskSucceeded.DESCRIPTOR.full_name,
    State.FAILED: events_pb2.TaskFailed.DESCRIPTOR.full_name,
    State.CANCELLED: events_pb2.TaskCancelled.DESCRIPTOR.full_name,
}
_MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class CursorMalformed(InvalidArgument):
    reason = "CURSOR_MALFORMED"


def task_to_proto(task: Task) -> pb.Task:
    return pb.Task(
        task_id=task.task_id,
        user_id=task.user_id,
        state=state_to_proto(task.state),
        input_file_id=task.input_file_id,
        operation=media_pb2.Operation.FromString(task.operation),
        progress=pb.Task.Progress(fraction=task.progress.fraction, stage=task.progress.stage),
        output_file_ids=task.output_file_ids,
        attempt=task.attempt,
        error=_error(task.failure),
        create_time=timestamp(task.create_time),
        start_time=timestamp(task.start_time),
        end_time=timestamp(task.end_time),
        update_time=timestamp(task.update_time),
        deadline_time=timestamp(task.deadline_time),
        batch_id=task.batch_id or "",
    )


def batch_to_proto(batch: Batch) -> pb.TaskBatch:
    counts = {state.lower(): count for state, count in batch.states.items()}
    return pb.TaskBatch(
        batch_id=batch.batch_id,
        user_id=batch.user_id,
        task_count=batch.size,
        fraction=batch.fraction,
        state_counts=pb.TaskBatch.StateCounts(**counts),
        create_time=timestamp(batch.create_time),
    )


def task_to_json(task: Task) -> str:
    """Return one line, as the edge's transcoder prints a task."""
    return _line(_printed(task_to_proto(task)))


def hook_body(task: Task) -> tuple[str, str]:
    """Return what a webhook is told of an ended task: the kind of event, and the body."""
    kind, shown = ENDS[task.state], task_to_proto(task)
    return kind, _line({"type": kind, "timestamp": shown.end_time.ToJsonString(), "data": _printed(shown)})


def webhook_to_proto(webhook: Webhook) -> webhook_pb2.Webhook:
    return webhook_pb2.Webhook(
        url=webhook.url or "",
        secret=webhook.secret,
        previous_secret_expire_time=timestamp(webhook.previous_expire_time),
        create_time=timestamp(webhook.create_time),
        update_time=timestamp(webhook.update_time),
    )


def delivery_to_proto(delivery: Delivery, webhook: Webhook | None) -> webhook_pb2.WebhookDelivery:
    pending = delivery.state is DeliveryState.PENDING
    return webhook_pb2.WebhookDelivery(
        delivery_id=delivery.delivery_id,
        task_id=delivery.task_id,
        event_id=delivery.event_id,
        event_type=delivery.kind,
        url=delivery.url or (webhook and webhook.url) or "",
        state=webhook_pb2.WebhookDelivery.State.Value(f"STATE_{delivery.state}"),
        attempts=delivery.attempts,
        status=delivery.status or 0,
        failure=delivery.failure or "",
        create_time=timestamp(delivery.create_time),
        attempt_time=timestamp(delivery.attempt_time),
        next_attempt_time=timestamp(delivery.due_time if pending else None),
    )


def delivery_query_from(request: webhook_pb2.ListWebhookDeliveriesRequest, user_id: str) -> DeliveryQuery:
    """Return the page that is asked for.

    Raises:
        PageTokenMalformed: the token is not one of this list.
    """
    after = str(paging.decode(request.page_token, (str,))[0]) if request.page_token else None
    return DeliveryQuery(user_id, request.task_id or None, after, request.page_size or paging.DEFAULT_PAGE_SIZE)


def delivery_page_token(page: DeliveryPage) -> str:
    """Return the token of the page of deliveries after `page`; empty when there is none."""
    return paging.encode([page.deliveries[-1].delivery_id]) if page.more else ""


def dead_letter_to_proto(task: Task) -> pb.DeadLetter:
    return pb.DeadLetter(
        task_id=task.task_id,
        user_id=task.user_id,
        error=_error(task.failure),
        attempts=task.failures,
        request_id=task.request_id,
        trace_id=task.trace_id,
        create_time=timestamp(task.create_time),
        dead_time=timestamp(task.dead_time),
    )


def refusal_to_proto(task_id: str, error: MeshError) -> pb.RedriveTasksResponse.Refusal:
    return pb.RedriveTasksResponse.Refusal(task_id=task_id, reason=error.reason, message=error.message)


def replay_place_from(page_token: str) -> str:
    """Return the last task of the page before; empty when there is none.

    Raises:
        PageTokenMalformed: the token is not one of such a call.
    """
    [task_id] = paging.decode(page_token, (str,)) if page_token else [""]
    return str(task_id)


def replay_to_proto(replay: Replay) -> pb.ReplayTasksResponse:
    return pb.ReplayTasksResponse(
        replayed_count=replay.replayed,
        incomplete_count=replay.incomplete,
        discrepancies=[
            pb.ReplayTasksResponse.Discrepancy(task_id=each.task_id, fields=each.fields)
            for each in replay.discrepancies
        ],
        next_page_token=paging.encode([replay.last]) if replay.last else "",
    )


def event_to_proto(event: Event) -> pb.TaskEvent:
    return pb.TaskEvent(
        sequence=event.sequence,
        state=state_to_proto(event.state),
        attempt=event.attempt,
        reason=event.reason,
        create_time=timestamp(event.create_time),
    )


def state_to_proto(state: State) -> pb.Task.State.ValueType:
    return pb.Task.State.Value(f"STATE_{state}")


def state_from(value: pb.Task.State.ValueType) -> State | None:
    """Return a state; None for the unspecified one."""
    if value == pb.Task.STATE_UNSPECIFIED:
        return None
    return State(pb.Task.State.Name(value).removeprefix("STATE_"))


def progress_from(request: pb.RenewLeaseRequest) -> Progress | None:
    if not request.HasField("progress"):
        return None
    return Progress(request.progress.fraction, request.progress.stage)


def deadline_from(request: pb.CreateTaskRequest | pb.CreateTaskBatchRequest) -> timedelta | None:
    return request.deadline_duration.ToTimedelta() if request.HasField("deadline_duration") else None


def failure_from(error: pb.Task.Error) -> Failure:
    return Failure(error.code, error.message, error.reason)


def query_from(request: pb.ListTasksRequest, user_id: str) -> Query:
    """Return the page that is asked for.

    Raises:
        PageTokenMalformed: the token is not one of this list.
    """
    return Query(
        user_id,
        state_from(request.state),
        request.batch_id or None,
        _place(request.page_token),
        request.page_size or paging.DEFAULT_PAGE_SIZE,
    )


def dead_query_from(request: pb.ListDeadLettersRequest) -> DeadQuery:
    """Return the page that is asked for.

    Raises:
        PageTokenMalformed: the token is not one of this list.
    """
    return DeadQuery(request.reason or None, _place(request.page_token), request.page_size or paging.DEFAULT_PAGE_SIZE)


def redrive_query_from(request: pb.RedriveTasksRequest, size: int) -> DeadQuery:
    """Return which dead letters of a reason are next.

    Raises:
        PageTokenMalformed: the token is not one of such a call.
    """
    return DeadQuery(request.reason, _place(request.page_token), size)


def event_query_from(request: pb.ListTaskEventsRequest) -> EventQuery:
    """Return the page that is asked for.

    Raises:
        PageTokenMalformed: the token is not one of this list.
    """
    [after] = paging.decode(request.page_token, (int,)) if request.page_token else [0]
    return EventQuery(request.task_id, int(after), request.page_size or paging.DEFAULT_PAGE_SIZE)


def event_page_token(page: EventPage) -> str:
    """Return the token of the page of events after `page`; empty when there is none."""
    return paging.encode([page.events[-1].sequence]) if page.more else ""


def page_token(page: Page) -> str:
    """Return the token of the page of tasks after `page`; empty when there is none."""
    return _token(page, lambda task: task.create_time)


def dead_page_token(page: Page) -> str:
    """Return the token of the page of dead letters after `page`; empty when there is none."""
    return _token(page, lambda task: task.dead_time or _EPOCH)


def _token(page: Page, time: Callable[[Task], datetime]) -> str:
    if not page.more:
        return ""
    last = page.tasks[-1]
    return paging.encode([(time(last) - _EPOCH) // _MICROSECOND, last.task_id])


def _place(token: str) -> tuple[datetime, str] | None:
    """Return the time and the task that a token names; None for an empty one."""
    if not token:
        return None
    microseconds, task_id = paging.decode(token, (int, str))
    try:
        return _EPOCH + int(microseconds) * _MICROSECOND, str(task_id)
    except OverflowError:
        raise paging.malformed() from None


def cursor_from(text: str) -> int | None:
    """Return the sequence after which a watch resumes; None for from now.

    Raises:
        CursorMalformed: a watch never gave it.
    """
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise CursorMalformed(
            "The cursor is not one that a watch gave; leave it empty to watch from now.", metadata={"cursor": text}
        )
    return int(text)


def cursor(task: Task) -> str:
    return str(task.sequence)


def outcome_to_proto(outcome: object) -> status_pb2.Status:
    """Return how one of several calls ended: what it raised, else OK."""
    if isinstance(outcome, MeshError):
        return status.to_status(outcome)
    if isinstance(outcome, BaseException):
        raise outcome
    return status_pb2.Status()


def fingerprint(request: pb.CreateTaskRequest | pb.CreateTaskBatchRequest) -> bytes:
    """Return a digest of what is asked for, without the key."""
    asked = copy.copy(request)
    asked.ClearField("request_id")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()


def message_of(notice: Notice) -> Message:
    """Return what goes to the broker for a notice; the same id however often it is made."""
    task = notice.task
    message_id = f"{task.task_id}/{task.sequence}"
    if isinstance(notice, Permit):
        return permit(task.pool, f"{message_id}/permit")
    return events.event(
        _payload(notice), source=SOURCE, subject=task.task_id, event_id=message_id, occur_time=task.update_time
    )


def permit(pool: str, message_id: str) -> Message:
    """Return a permit to claim one task of a pool. It names none: the claim picks."""
    return Message(exchange="", routing_key=queue(pool), body=b"", message_id=message_id)


def pool_of(operation: Proto) -> str:
    """Return the most demanding pool that the contract names at what an operation sets, anywhere in it."""
    return POOLS[max(_demands(operation), default=0)]


def _demands(message: Proto) -> Iterator[int]:
    for field, value in message.ListFields():
        if named := field.GetOptions().Extensions[policy_pb2.pool]:
            yield POOLS.index(named)
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                yield from _demands(each)


def queue(pool: str) -> str:
    """Return the name of the queue that holds a pool's permits."""
    return f"media.{pool}"


def _payload(notice: TaskCreated | TaskSucceeded | TaskFailed | TaskCancelled) -> Proto:
    task = notice.task
    match notice:
        case TaskCreated():
            return events_pb2.TaskCreated(
                task_id=task.task_id, user_id=task.user_id, reservation_id=task.reservation_id
            )
        case TaskSucceeded():
            return events_pb2.TaskSucceeded(
                task_id=task.task_id,
                user_id=task.user_id,
                reservation_id=task.reservation_id,
                output_file_ids=task.output_file_ids,
            )
        case TaskFailed():
            return events_pb2.TaskFailed(
                task_id=task.task_id,
                user_id=task.user_id,
                reservation_id=task.reservation_id,
                reason=task.failure.reason if task.failure else "",
            )
        case TaskCancelled():
            return events_pb2.TaskCancelled(
                task_id=task.task_id, user_id=task.user_id, reservation_id=task.reservation_id
            )


def _printed(message: Proto) -> dict[str, Any]:
    return MessageToDict(message, always_print_fields_with_no_presence=True)


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _error(failure: Failure | None) -> pb.Task.Error | None:
    if failure is None:
        return None
    return pb.Task.Error(code=failure.code, message=failure.message, reason=failure.reason)
