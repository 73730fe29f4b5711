"""WatchTask and WatchTaskEvents: every state in order, from any replica, from any cursor."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

import grpc
import pytest
from atelier.media.v1 import media_pb2
from atelier.task.v1 import task_pb2 as pb
from atelier.task.v1.task_pb2_grpc import TaskServiceStub
from google.protobuf.json_format import Parse
from sqlalchemy import delete

from mesh import status
from mesh.errors import MeshError, Unavailable
from services.task.domain import Terms
from services.task.tables import task_event
from tests.eventually import eventually
from tests.mesh_server import NARROW, headers
from tests.service.task.conftest import OWNER, PHOTO, STRANGER, Bus, Replica, Start, refused

Seen = tuple[str, int]  # state, cursor


class Watcher:
    """Collects what a typed watch sends."""

    def __init__(self, replica: Replica, task: pb.Task, cursor: str = "") -> None:
        self.answers: list[pb.WatchTaskResponse] = []
        self._stream = replica.user().WatchTask(pb.WatchTaskRequest(task_id=task.task_id, cursor=cursor))

    async def next(self) -> pb.WatchTaskResponse:
        async with asyncio.timeout(5):
            self.answers.append(await anext(self._stream))
        return self.answers[-1]

    async def rest(self) -> list[Seen]:
        """Return what comes until the stream ends, each state once."""
        async with asyncio.timeout(10):
            self.answers += [answer async for answer in self._stream]
        return self.states()

    def states(self) -> list[Seen]:
        seen = [
            (pb.Task.State.Name(answer.task.state).removeprefix("STATE_"), int(answer.cursor))
            for answer in self.answers
        ]
        return list(dict.fromkeys(seen))


def renewal(task: pb.Task, fraction: float) -> pb.RenewLeaseRequest:
    progress = pb.Task.Progress(fraction=fraction, stage="process")
    return pb.RenewLeaseRequest(task_id=task.task_id, attempt=task.attempt, progress=progress)


async def event_stream(replica: Replica, task_id: str, **metadata: str) -> str:
    request = pb.WatchTaskEventsRequest(task_id=task_id)
    bodies = [body async for body in replica.user(**metadata).WatchTaskEvents(request)]
    assert {body.content_type for body in bodies} == {"text/event-stream"}
    return b"".join(body.data for body in bodies).decode()


async def test_a_watch_shows_the_task_now_its_states_its_progress_and_ends_with_it(replica: Replica):
    created = await replica.create()
    watcher = Watcher(replica, created)

    assert (await watcher.next()).task == created
    task = await replica.claimed()
    assert (await watcher.next()).task.state == pb.Task.STATE_RUNNING
    await replica.worker.RenewLease(renewal(task, 0.5))
    assert (await watcher.next()).task.progress.fraction == 0.5
    await replica.complete(task)

    assert await watcher.rest() == [("QUEUED", 1), ("RUNNING", 2), ("SUCCEEDED", 3)]
    assert watcher.answers[-1].task.output_file_ids == ["fil_result"]


@pytest.mark.parametrize("broker_away", [False, True])
async def test_a_watch_sees_what_another_replica_does(start: Start, bus: Bus, broker_away: bool):
    bus.away = broker_away
    here, there = await start(Terms()), await start(Terms())
    watcher = Watcher(here, await there.create())
    await watcher.next()

    task = await there.claimed()
    await watcher.next()
    await there.complete(task)

    assert await watcher.rest() == [("QUEUED", 1), ("RUNNING", 2), ("SUCCEEDED", 3)]


async def test_a_watch_goes_on_where_it_was_once_the_database_is_back(
    replica: Replica, bus: Bus, monkeypatch: pytest.MonkeyPatch
):
    bus.away = True  # nobody else tells of it
    watcher = Watcher(replica, await replica.create())
    await watcher.next()

    async def away(_: object) -> None:
        raise Unavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(replica.tasks, "histories", away)
        patch.setattr(replica.tasks, "versions", away)
        await replica.complete(await replica.claimed())
        await asyncio.sleep(2.5)

    assert await watcher.rest() == [("QUEUED", 1), ("RUNNING", 2), ("SUCCEEDED", 3)]


async def test_a_task_that_has_lost_its_events_holds_up_no_watch_and_is_shown_as_it_is(replica: Replica):
    damaged, task = await replica.create(), await replica.create()
    async with replica.database.transaction() as connection:
        await connection.execute(delete(task_event).where(task_event.c.task_id == damaged.task_id))
    watchers = [Watcher(replica, each) for each in (damaged, task)]

    shown = await asyncio.gather(*(watcher.next() for watcher in watchers))

    assert [each.task for each in shown] == [damaged, task]


async def test_no_state_is_skipped_however_fast_they_follow(start: Start):
    replica = await start(Terms(backoff=timedelta(milliseconds=1)))
    watcher = Watcher(replica, await replica.create())
    await watcher.next()

    for _ in range(2):
        await replica.fail(await replica.claimed(), transient=True)
    await replica.complete(await replica.claimed())

    assert [state for state, _ in await watcher.rest()] == [
        "QUEUED",
        "RUNNING",
        "QUEUED",
        "RUNNING",
        "QUEUED",
        "RUNNING",
        "SUCCEEDED",
    ]


async def test_many_watchers_of_one_task_see_the_same(replica: Replica):
    created = await replica.create()
    watchers = [Watcher(replica, created) for _ in range(20)]
    await asyncio.gather(*(watcher.next() for watcher in watchers))

    await replica.complete(await replica.claimed())

    seen = await asyncio.gather(*(watcher.rest() for watcher in watchers))
    assert seen == [[("QUEUED", 1), ("RUNNING", 2), ("SUCCEEDED", 3)]] * 20


async def test_a_watch_resumes_after_its_cursor_on_any_replica(start: Start):
    here, there = await start(), await start()
    task = await here.create()
    await here.complete(await here.claimed())

    for cursor, expected in {
        "": [("SUCCEEDED", 3)],
        "0": [("QUEUED", 1), ("RUNNING", 2), ("SUCCEEDED", 3)],
        "1": [("RUNNING", 2), ("SUCCEEDED", 3)],
        "3": [],
    }.items():
        assert await Watcher(there, task, cursor).rest() == expected


@pytest.mark.parametrize("as_events", [False, True])
async def test_a_slow_watcher_is_dropped_and_resumes_without_losing_a_state(start: Start, as_events: bool):
    replica, patient = await start(Terms(), reader_seconds=0.3), await start(Terms())
    # So that few states fill what a reader's window and gRPC's own buffer hold, of which that is more on some days.
    text = media_pb2.Watermark.Text(content="\U0001f4f7" * 200)
    steps = [media_pb2.Pipeline.Step(watermark=media_pb2.Watermark(text=text))] * 8
    operation = media_pb2.Operation(pipeline=media_pb2.Pipeline(steps=steps))
    task = await replica.user().CreateTask(pb.CreateTaskRequest(input_file_id=PHOTO, operation=operation))
    for _ in range(30):
        await replica.fail(await replica.claimed(), returned=True)
    await replica.complete(await replica.claimed())
    async with replica.server.bare(options=NARROW) as narrow:
        stub, seen = TaskServiceStub(narrow), []
        carried = headers(OWNER, extra={"last-event-id": "0"}).items()
        if as_events:
            stream = stub.WatchTaskEvents(pb.WatchTaskEventsRequest(task_id=task.task_id), metadata=[*carried])
        else:
            stream = stub.WatchTask(pb.WatchTaskRequest(task_id=task.task_id, cursor="0"), metadata=[*carried])
        seen.append(await stream.read())

        await eventually(lambda: not replica.watches.has_watchers(task.task_id), within_seconds=20)
        with suppress(grpc.aio.AioRpcError):
            while (answer := await stream.read()) is not grpc.aio.EOF:
                seen.append(answer)

    error = status.from_call(await stream.code(), "", tuple(await stream.trailing_metadata()))
    assert (error.reason, error.metadata["seconds"]) == ("WATCHER_TOO_SLOW", "0.3")
    cursors = [int(re.search(rb"id: (\d+)", each.data).group(1)) if as_events else int(each.cursor) for each in seen]
    resumed = await Watcher(patient, task, str(cursors[-1])).rest()
    assert cursors + [cursor for _, cursor in resumed] == list(range(1, 64))
    assert len(cursors) < 63


async def test_a_failed_task_that_is_retried_goes_on(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await replica.fail(task)
    await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))
    watcher = Watcher(replica, task, "2")
    await watcher.next()

    await replica.complete(await replica.claimed())

    assert [state for state, _ in await watcher.rest()] == ["FAILED", "QUEUED", "RUNNING", "SUCCEEDED"]
    assert watcher.answers[0].task.error.reason == "INPUT_DAMAGED"
    assert not watcher.answers[-1].task.HasField("error")


async def test_an_event_stream_is_the_same_watch_in_json(replica: Replica):
    await replica.create()
    task = await replica.claimed()
    await replica.complete(task)

    stream = await event_stream(replica, task.task_id, last_event_id="1")

    begin, running, succeeded, end = stream.split("\n\n")
    assert begin == "retry: 1000"
    assert running.startswith("id: 2\ndata: {")
    printed = json.loads(succeeded.removeprefix("id: 3\ndata: "))
    assert (printed["state"], printed["outputFileIds"]) == ("STATE_SUCCEEDED", ["fil_result"])
    assert printed["operation"] == {"resize": {"width": 800, "fit": "FIT_UNSPECIFIED", "format": "FORMAT_UNSPECIFIED"}}
    assert end == ""
    assert Parse(json.dumps(printed), pb.Task()) == await replica.user().GetTask(
        pb.GetTaskRequest(task_id=task.task_id)
    )


async def test_a_quiet_event_stream_carries_comments(start: Start):
    replica = await start(Terms(), idle_seconds=0.05)
    task = await replica.create()
    request = pb.WatchTaskEventsRequest(task_id=task.task_id)
    stream: AsyncIterator = replica.user().WatchTaskEvents(request)

    frames = [(await anext(stream)).data for _ in range(3)]

    assert frames[0].startswith(b"retry: 1000\n\nid: 1\n")
    assert frames[1:] == [b": nothing new\n\n"] * 2


async def test_a_watch_ends_a_quarter_of_an_hour_after_the_token(start: Start):
    replica = await start(Terms(), idle_seconds=0.05)
    task = await replica.create()
    watcher = Watcher(replica, task)
    await watcher.next()
    replica.clock.time += timedelta(minutes=21)

    with pytest.raises(MeshError) as refusal:
        await watcher.rest()
    stream = await event_stream(replica, task.task_id)

    assert (refusal.value.code, refusal.value.reason) == ("UNAUTHENTICATED", "TOKEN_EXPIRED")
    last = stream.split("\n\n")[-2]
    assert last.startswith("event: error\ndata: ")
    printed = json.loads(last.removeprefix("event: error\ndata: "))
    assert (printed["code"], printed["details"][0]["reason"]) == (16, "TOKEN_EXPIRED")


async def test_a_watch_ends_when_its_session_is_revoked(replica: Replica):
    task = await replica.create()
    watcher = Watcher(replica, task)
    await watcher.next()
    events = replica.user().WatchTaskEvents(pb.WatchTaskEventsRequest(task_id=task.task_id))
    await anext(events)

    replica.server.revoke("sid", "ses_test")

    with pytest.raises(MeshError) as refusal:
        await watcher.rest()
    assert (refusal.value.code, refusal.value.reason) == ("UNAUTHENTICATED", "TOKEN_REVOKED")
    last = (await anext(events)).data.decode()
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.removeprefix("event: error\ndata: "))["details"][0]["reason"] == "TOKEN_REVOKED"
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_anothers_task_cannot_be_watched(replica: Replica):
    task = await replica.create()
    stub = replica.user(STRANGER)

    for stream in (
        stub.WatchTask(pb.WatchTaskRequest(task_id=task.task_id)),
        stub.WatchTaskEvents(pb.WatchTaskEventsRequest(task_id=task.task_id)),
    ):
        refusal = await refused(anext(stream))
        assert (refusal.reason, refusal.metadata["task_id"]) == ("TASK_NOT_FOUND", task.task_id)


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 64])
async def test_a_cursor_that_no_watch_gave_is_refused(replica: Replica, cursor: str):
    task = await replica.create()

    refusal = await refused(anext(replica.user().WatchTask(pb.WatchTaskRequest(task_id=task.task_id, cursor=cursor))))

    assert (refusal.code, refusal.reason, refusal.metadata["cursor"]) == (
        "INVALID_ARGUMENT",
        "CURSOR_MALFORMED",
        cursor,
    )
