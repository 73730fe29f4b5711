"""R-01, R-02, R-24, R-27: what is promised of tasks, kept with the real user service and a real broker."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from atelier.media.v1 import media_pb2
from atelier.task.v1 import task_pb2 as pb

from mesh import broker, database
from mesh.broker import Broker, Delivery
from mesh.clock import SystemClock
from mesh.errors import Unavailable
from mesh.outbox import Message
from mesh.service import every
from services.task.domain import Terms
from services.task.upkeep import Upkeep
from services.user.consumers import TaskEvents
from services.user.domain import Account, Kind, Usage
from services.user.handlers import UserService
from services.user.repository import SqlAccounts, SqlQuotas
from tests import rabbitmq
from tests.databases import NewDatabase, on_sqlite
from tests.eventually import eventually
from tests.service.task.conftest import OWNER, PHOTO, Replica, Start, refused

CLOCK = SystemClock()
KILLS = int(os.environ.get("ATELIER_TEST_KILLS", "20"))
MANY = 1000

pytestmark = pytest.mark.timeout(240 + 2 * KILLS)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rabbitmq.Node]:
    with rabbitmq.running(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture
async def bus(node: rabbitmq.Node) -> AsyncIterator[Broker]:
    async with broker.opened(node.url) as bus:
        yield bus


@pytest.fixture
def left() -> int:
    """How many tasks OWNER may still have."""
    return MANY


@pytest.fixture
async def quotas(new_database: NewDatabase, left: int) -> AsyncIterator[SqlQuotas]:
    async with database.opened(await new_database("user")) as sql:
        owner = Account(OWNER, "ada", "ada@example.com", "", CLOCK.now(), limits={Kind.TASKS: left})
        await SqlAccounts(sql).register(owner, request_id="")
        quotas = SqlQuotas(sql)
        yield quotas
        assert await quotas.audit() == []


@pytest.fixture
def users(quotas: SqlQuotas) -> UserService:
    """Return the real thing, for `start`; nobody signs in."""
    nobody: Any = None
    return UserService(nobody, quotas, nobody, nobody, nobody, admin_secret="", clock=CLOCK)


async def used(quotas: SqlQuotas) -> Usage:
    return (await quotas.usage(OWNER, CLOCK.now()))[Kind.TASKS]


@asynccontextmanager
async def background(*works: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    running = [asyncio.create_task(work()) for work in works]
    try:
        yield
    finally:
        for each in running:
            each.cancel()
        await asyncio.wait(running)


@pytest.mark.parametrize("left", [1, MANY])
async def test_fifty_calls_with_one_key_are_one_task_also_with_quota_for_one(
    start: Start, quotas: SqlQuotas, left: int, record_property: Callable[[str, object], None]
):
    """R-24."""
    replicas = [await start(), await start()]

    answers = await asyncio.gather(*(replicas[n % 2].create(request_id="key") for n in range(50)))

    assert all(answer == answers[0] for answer in answers)
    assert list((await replicas[0].user().ListTasks(pb.ListTasksRequest())).tasks) == [answers[0]]
    assert await used(quotas) == Usage(used=0, reserved=1)
    record_property(
        "R-24", f"50 calls with one key and quota for {left:,}: one task, one reservation, 50 equal answers"
    )


class Worker:
    """Claims a task for each permit and completes it at once, unless it is told to keep what it claims."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.done: list[str] = []
        self.permits = 0
        self.keeps = False

    async def take(self, _: Delivery) -> None:
        self.permits += 1
        assignment = await self._replica.claim()
        if assignment and not self.keeps:
            await self._replica.complete(assignment.task, f"fil_{assignment.task.task_id}_{assignment.task.attempt}")
            self.done.append(assignment.task.task_id)

    async def run(self, bus: Broker) -> None:
        await bus.consume("media.cpu", self.take, prefetch=5)


class Thrice:
    """Publishes each message three times at once."""

    def __init__(self, bus: Broker) -> None:
        self._bus = bus

    async def publish(self, *messages: Message) -> None:
        await asyncio.gather(*(self._bus.publish(*messages) for _ in range(3)))


async def test_messages_that_are_each_delivered_three_times_have_the_effect_of_one(
    replica: Replica, quotas: SqlQuotas, bus: Broker, record_property: Callable[[str, object], None]
):
    """R-01."""
    workers = [Worker(replica), Worker(replica)]
    taken: list[str] = []

    class Events(TaskEvents):
        async def take(self, deliveries: Sequence[Delivery]) -> None:
            await super().take(deliveries)
            taken.extend(each.message_id for each in deliveries)

    events = Events(quotas, CLOCK).work(bus)
    async with background(
        *(lambda each=each: each.run(bus) for each in workers), *events, partial(replica.outbox.relay, Thrice(bus))
    ):
        created = [(await replica.create()).task_id for _ in range(10)]

        await eventually(lambda: len(taken) >= 3 * 2 * len(created), within_seconds=60)
        await eventually(lambda: sum(each.permits for each in workers) >= 3 * len(created), within_seconds=60)

    assert sorted(workers[0].done + workers[1].done) == sorted(created)
    for history in await replica.tasks.histories(created):
        assert [event.state for event in history.events] == ["QUEUED", "RUNNING", "SUCCEEDED"]
        assert history.task.output_file_ids == (f"fil_{history.task.task_id}_1",)
    assert len(set(taken)) == 2 * len(created)
    assert await used(quotas) == Usage(used=len(created), reserved=0)
    record_property(
        "R-01", f"{len(taken)} deliveries of {len(set(taken))} events: {len(created)} tasks, charged once each"
    )


# A process for each task, forked from one that has loaded everything, which takes most of the time. It dies after the
# commit, with the messages in its hands.
KILLED_AFTER_THE_COMMIT = """
import asyncio, os, signal, sys
from functools import partial
from mesh import database, ids
from mesh.outbox import Outbox
from services.task import convert, domain
from services.task.repository import SqlTasks
from services.task.tables import outbox_table
from tests.service.task.conftest import OWNER, PHOTO, resize

async def die(url):
    async with database.opened(url) as sql:
        outbox = Outbox(sql, outbox_table)
        relaying = asyncio.create_task(outbox.relay(None))
        await asyncio.sleep(0)
        tasks = SqlTasks(sql, outbox, convert.message_of, convert.hook_body)
        tasks.after_commit(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        operation, task_id = resize().operation.SerializeToString(), ids.new("tsk")
        print(task_id, flush=True)
        await tasks.add(task_id, partial(
            domain.created, task_id=task_id, user_id=OWNER, role="ROLE_USER", input_file_id=PHOTO, file_ids=(PHOTO,),
            operation=operation,
        ))

for _ in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        asyncio.run(die(sys.argv[1]))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


async def test_what_was_committed_before_its_process_was_killed_reaches_a_worker(
    replica: Replica, url: str, bus: Broker, record_property: Callable[[str, object], None]
):
    """R-02."""
    dying = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED_AFTER_THE_COMMIT, url, str(KILLS), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await dying.communicate()
    committed = output.decode().split()
    worker = Worker(replica)
    async with background(lambda: worker.run(bus), partial(replica.outbox.relay, bus)):
        await eventually(lambda: len(worker.done) == KILLS, within_seconds=60 + KILLS)

    assert (dying.returncode, len(committed)) == (0, KILLS)
    assert sorted(worker.done) == sorted(committed)
    record_property("R-02", f"{KILLS:,} processes killed after their commit: {len(worker.done):,} tasks were done")


@on_sqlite  # what is claimed by whom is of both, and elsewhere; this is of the broker, and takes its time
async def test_a_thousand_queued_tasks_outlive_the_broker_and_their_workers(
    start: Start, quotas: SqlQuotas, node: rabbitmq.Node, bus: Broker, record_property: Callable[[str, object], None]
):
    """R-27."""
    terms = Terms(lease=timedelta(seconds=2), slack=timedelta(0), attempts=20, backoff=timedelta(milliseconds=50))
    replica = await start(terms)
    operation = media_pb2.Operation(resize=media_pb2.Resize(width=8))
    item = pb.CreateTaskBatchRequest.Item(input_file_id=PHOTO, operation=operation)
    batch = await replica.user().CreateTaskBatch(pb.CreateTaskBatchRequest(items=[item] * MANY))
    keeper = Upkeep(replica.tasks, bus, lambda: terms)
    works = [
        partial(replica.outbox.relay, bus),
        every(0.2, keeper.reap),
        every(0.5, keeper.replenish),
        *TaskEvents(quotas, CLOCK).work(bus),
    ]

    async with background(*works):
        first = Worker(replica)
        async with background(lambda: first.run(bus)):
            await eventually(lambda: len(first.done) > MANY // 5, within_seconds=60)
            first.keeps = True
            await eventually(lambda: has_running(replica, batch.batch_id))
            node.kill()
        with pytest.raises(Unavailable):
            await bus.check()
        await asyncio.to_thread(node.start)
        second = Worker(replica)
        async with background(lambda: second.run(bus)):
            await eventually(lambda: len(first.done + second.done) == MANY, within_seconds=120)

            async def charged() -> bool:
                return await used(quotas) == Usage(used=MANY, reserved=0)

            await eventually(charged, within_seconds=60)

    found = await replica.user().GetTaskBatch(pb.GetTaskBatchRequest(batch_id=batch.batch_id))
    unknown = await refused(replica.user().GetTask(pb.GetTaskRequest(task_id="tsk_unknown")))
    assert found.state_counts == pb.TaskBatch.StateCounts(succeeded=MANY)
    assert len(set(first.done + second.done)) == MANY
    assert (unknown.code, unknown.reason) == ("NOT_FOUND", "TASK_NOT_FOUND")
    record_property("R-27", f"{MANY:,} queued, broker and worker killed: {found.state_counts.succeeded:,} succeeded")


async def has_running(replica: Replica, batch_id: str) -> bool:
    """Tell whether somebody has claimed a task and not completed it."""
    found = await replica.user().GetTaskBatch(pb.GetTaskBatchRequest(batch_id=batch_id))
    return found.state_counts.running > 0
