"""GetTask, ListTasks, ListTaskEvents: one's own tasks, newest first, and nobody else's."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from atelier.task.v1 import task_pb2 as pb
from sqlalchemy import Dialect, text

from mesh import paging
from services.task.domain import Query, State
from services.task.repository import listed
from services.task.tables import QUEUED, RUNNING, UNENDED
from tests.databases import on_postgresql, on_sqlite
from tests.service.task.conftest import OWNER, STRANGER, Replica, refused


async def test_pages_are_complete_in_order_and_end(replica: Replica):
    created = [(await replica.create()).task_id for _ in range(5)]

    seen, token = [], ""
    for _ in range(3):
        page = await replica.user().ListTasks(pb.ListTasksRequest(page_size=2, page_token=token))
        seen += [task.task_id for task in page.tasks]
        token = page.next_page_token

    assert seen == created[::-1]
    assert token == ""


async def test_events_come_in_pages(replica: Replica):
    task = await replica.create()
    for _ in range(30):
        await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))
        await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))

    first = await replica.user().ListTaskEvents(pb.ListTaskEventsRequest(task_id=task.task_id))
    seen, request = [], pb.ListTaskEventsRequest(task_id=task.task_id, page_size=20)
    while not seen or request.page_token:
        page = await replica.user().ListTaskEvents(request)
        seen.append([event.sequence for event in page.events])
        request.page_token = page.next_page_token

    assert (len(first.events), bool(first.next_page_token)) == (50, True)
    assert seen == [[*range(1, 21)], [*range(21, 41)], [*range(41, 61)], [61]]


async def test_a_full_last_page_has_no_next(replica: Replica):
    for _ in range(2):
        await replica.create()

    page = await replica.user().ListTasks(pb.ListTasksRequest(page_size=2))

    assert (len(page.tasks), page.next_page_token) == (2, "")


async def test_a_list_can_be_limited_to_a_state(replica: Replica):
    first, second = await replica.create(), await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=first.task_id))

    for state, expected in ((pb.Task.STATE_CANCELLED, first), (pb.Task.STATE_QUEUED, second)):
        page = await replica.user().ListTasks(pb.ListTasksRequest(state=state))
        assert [task.task_id for task in page.tasks] == [expected.task_id]


async def test_a_strangers_list_is_empty(replica: Replica):
    await replica.create()

    assert not (await replica.user(STRANGER).ListTasks(pb.ListTasksRequest())).tasks


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.ListTasksRequest(page_token="rubbish"), "PAGE_TOKEN_MALFORMED"),
        (pb.ListTasksRequest(page_token=paging.encode([2**62, "tsk_1"])), "PAGE_TOKEN_MALFORMED"),
        (pb.ListTasksRequest(state=77), "FIELD_OUT_OF_RANGE"),
    ],
)
async def test_a_list_that_makes_no_sense_is_refused(replica: Replica, request_: pb.ListTasksRequest, reason: str):
    refusal = await refused(replica.user().ListTasks(request_))

    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)


@pytest.mark.parametrize("token", ["rubbish", paging.encode(["1"])])
async def test_a_page_of_events_that_no_list_gave_is_refused(replica: Replica, token: str):
    task = await replica.create()

    refusal = await refused(
        replica.user().ListTaskEvents(pb.ListTaskEventsRequest(task_id=task.task_id, page_token=token))
    )

    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "PAGE_TOKEN_MALFORMED")


async def test_anothers_task_is_not_found_exactly_as_a_missing_one(replica: Replica):
    task = await replica.create()

    for task_id in (task.task_id, "tsk_none"):
        stub = replica.user(STRANGER)
        for call in (
            stub.GetTask(pb.GetTaskRequest(task_id=task_id)),
            stub.CancelTask(pb.CancelTaskRequest(task_id=task_id)),
            stub.RetryTask(pb.RetryTaskRequest(task_id=task_id)),
            stub.ListTaskEvents(pb.ListTaskEventsRequest(task_id=task_id)),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason, refusal.metadata) == (
                "NOT_FOUND",
                "TASK_NOT_FOUND",
                {"task_id": task_id},
            )


SEARCHES = {
    f"SELECT count(*) FROM task WHERE {QUEUED} AND pool = 'cpu' AND due_time < 1": "task_turns",
    f"SELECT * FROM task WHERE {QUEUED} AND pool = 'cpu' AND due_time < 1 ORDER BY turn, task_id": "task_turns",
    f"SELECT turn FROM task WHERE {QUEUED} AND pool = 'cpu' AND start_time IS NULL ORDER BY turn": "task_turns",
    f"SELECT turn FROM task WHERE {UNENDED} AND pool = 'cpu' AND user_id = '{OWNER}' ORDER BY turn DESC": (
        "task_turns_of_user"
    ),
    "SELECT state FROM task WHERE batch_id = 'bat_1'": "task_by_batch",
    f"SELECT task_id FROM task WHERE {RUNNING} AND lease_time < 1 ORDER BY lease_time": "task_leases",
    "SELECT task_id FROM task WHERE end_time < 1 ORDER BY end_time": "task_ended",
    "SELECT * FROM task WHERE dead_time IS NOT NULL ORDER BY dead_time, task_id": "task_dead_letters",
    f"SELECT task_id FROM task WHERE {UNENDED} AND deadline_time < 1 ORDER BY deadline_time": "task_deadlines",
}
"""What is looked for among many tasks, and the index that has it in order."""
PAGES = {
    (None, None): "task_by_user",
    (State.FAILED, None): "task_by_user_and_state",
    (None, "bat_1"): "task_by_batch",
    (State.FAILED, "bat_1"): "task_by_batch",
}
"""By which state and batch a list may be limited, and likewise its index."""


def searches(dialect: Dialect) -> Iterator[tuple[str, str]]:
    """Yield each search, and its index."""
    yield from SEARCHES.items()
    for (state, batch_id), index in PAGES.items():
        for after in (None, (datetime(2026, 11, 1, tzinfo=UTC), "tsk_1")):
            page = listed(Query(OWNER, state, batch_id, after, size=50))
            yield str(page.compile(dialect=dialect, compile_kwargs={"literal_binds": True})), index


@on_sqlite
async def test_every_search_of_many_tasks_uses_an_index(replica: Replica):
    async with replica.database.reading() as connection:
        for search, index in searches(connection.dialect):
            plan = " ".join(row.detail for row in await connection.execute(text(f"EXPLAIN QUERY PLAN {search}")))
            assert f"USING INDEX {index} " in plan or f"USING COVERING INDEX {index} " in plan, plan
            assert "TEMP B-TREE" not in plan


@on_postgresql
async def test_every_search_of_many_tasks_can_use_an_index(replica: Replica):
    async with replica.database.reading() as connection:
        # There are few tasks here: it would read all of them.
        for way in ("seqscan", "bitmapscan", "sort"):
            await connection.execute(text(f"SET LOCAL enable_{way} = off"))
        for search, index in searches(connection.dialect):
            plan = "\n".join(await connection.scalars(text(f"EXPLAIN {search}")))
            assert re.search(rf"using {index}\b", plan), plan
            assert "Sort" not in plan
