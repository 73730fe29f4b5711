"""A task service on a real server and a real database, with peers that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from ipaddress import ip_network
from typing import Any

import pytest
from atelier.media.v1 import media_pb2
from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from atelier.task.v1 import task_pb2 as pb
from atelier.task.v1.task_pb2_grpc import TaskServiceStub, add_TaskServiceServicer_to_server
from atelier.task.v1.webhook_pb2_grpc import WebhookServiceStub, add_WebhookServiceServicer_to_server
from atelier.user.v1 import user_pb2, user_pb2_grpc

from mesh import database, lock, wire
from mesh.errors import MeshError, NotFound, ResourceExhausted, Unavailable, Unimplemented
from mesh.outbox import Message, MessageUnroutable, Outbox
from mesh.service import READER_SECONDS
from services.task import convert
from services.task.domain import FORGET, Step, Task, Terms
from services.task.handlers import CLAIMS_WAIT_SECONDS, TaskService, WebhookService
from services.task.repository import SqlTasks
from services.task.tables import lock_table, outbox_table
from services.task.upkeep import Upkeep
from services.task.watch import Watches
from services.task.webhook_repository import SqlWebhooks
from tests.databases import NewDatabase
from tests.eventually import eventually
from tests.held_clock import HeldClock
from tests.mesh_server import Server, serving

KEY = "c" * 64
OWNER, STRANGER = "usr_1", "usr_2"
LOOPBACK = ip_network("127.0.0.0/8")
PHOTO, MARK, TEXT = "fil_photo", "fil_mark", "fil_text"
BRISK = Terms(lease=timedelta(milliseconds=200), slack=timedelta(milliseconds=50), backoff=timedelta(milliseconds=20))


class FileNotFound(NotFound):
    reason = "FILE_NOT_FOUND"


class QuotaExceeded(ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


class Storage(storage_pb2_grpc.StorageServiceServicer):
    """Knows three files of OWNER."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.is_old = False
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()
        self.types = {PHOTO: "image/jpeg", MARK: "image/png", TEXT: "text/plain"}

    async def StatFile(self, request, _):
        self.asked.set()
        await self.answers.wait()
        if self.failure:
            raise self.failure
        if request.user_id != OWNER or request.file_id not in self.types:
            raise FileNotFound(f"There is no file {request.file_id}.", metadata={"file_id": request.file_id})
        return storage_pb2.File(file_id=request.file_id, content_type=self.types[request.file_id])

    async def StatFiles(self, request, _):
        if self.failure:
            raise self.failure
        if self.is_old:
            raise Unimplemented("A release of before this call.")
        known = self.types if request.user_id == OWNER else {}
        return storage_pb2.StatFilesResponse(
            files=[
                storage_pb2.File(file_id=each, content_type=known[each]) for each in request.file_ids if each in known
            ]
        )


class Users(user_pb2_grpc.UserServiceServicer):
    """Sets aside up to `limit` tasks."""

    def __init__(self) -> None:
        self.limit = 1000
        self.reserved: set[str] = set()
        self.failure: Exception | None = None
        self.takes: Callable[[], None] = lambda: None

    async def ReserveQuotas(self, request, _):
        if len(self.reserved | {*request.reservation_ids}) > self.limit:
            raise QuotaExceeded("All used.", metadata={"metric": "tasks", "limit": str(self.limit)})
        self.reserved |= {*request.reservation_ids}
        self.takes()
        if self.failure:  # after it took effect: the answer is what was lost
            raise self.failure
        return user_pb2.ReserveQuotasResponse()


class Bus:
    """A broker between the replicas of a test."""

    def __init__(self) -> None:
        self.away = False
        self.workers = 1
        self.workerless = ""
        self.missing = ""
        """The queue that nobody has made yet."""
        self.waiting: list[Message] = []
        self._listeners: list[asyncio.Queue[bytes]] = []

    async def broadcast(self, _name: str, body: bytes) -> None:
        for listener in [] if self.away else self._listeners:
            listener.put_nowait(body)

    async def listen(self, _name: str) -> AsyncIterator[bytes]:
        listener: asyncio.Queue[bytes] = asyncio.Queue()
        self._listeners.append(listener)
        while True:
            yield await listener.get()

    async def depth(self, queue: str) -> int:
        return sum(message.routing_key == queue for message in self.waiting)

    async def consumers(self, queue: str) -> int:
        if self.away:
            raise Unavailable("away")
        return 0 if queue == self.workerless else self.workers

    async def publish(self, *messages: Message) -> None:
        if self.missing in {message.routing_key for message in messages}:
            raise MessageUnroutable("No queue takes it yet.", metadata={"routing_key": self.missing})
        self.waiting += messages


class Interrupted(SqlTasks):
    """Crashes once, at the step that `crash_at` names, and meets `bug` at each step with the task `broken_id`."""

    crash_at = ""
    broken_id = ""
    bug: Exception = ValueError("its row makes no sense")

    def _reach(self, step: str) -> None:
        if self.crash_at == step:
            self.crash_at = ""
            raise RuntimeError(f"crashed: {step}")

    async def adopt(self, *arguments: Any) -> tuple[str, bool]:
        self._reach("before the key")
        adopted = await super().adopt(*arguments)
        self._reach("after the key")
        return adopted

    async def add(self, task_id: str, created: Callable[[datetime], Any]) -> Any:
        self._reach("before the transaction")

        def interrupted(now: datetime) -> Any:
            change = created(now)
            self._reach("inside the transaction")
            return change

        task = await super().add(task_id, interrupted)
        self._reach("after the commit")
        return task

    async def add_batch(self, batch_id: str, created: Callable[[datetime], Any]) -> Any:
        self._reach("before the transaction")

        def interrupted(now: datetime) -> Any:
            changes = created(now)
            self._reach("inside the transaction")
            return changes

        return await super().add_batch(batch_id, interrupted)

    async def change(self, task_id: str, step: Step, *, owner: str | None = None) -> Task:
        if task_id == self.broken_id:
            raise self.bug
        return await super().change(task_id, step, owner=owner)


@dataclass
class Replica:
    """One process of the service, and who calls it."""

    server: Server
    tasks: Interrupted
    watches: Watches
    database: database.Database
    outbox: Outbox
    clock: HeldClock
    upkeep: Upkeep
    uptime: list[float]
    """Seconds that upkeep believes to have passed, held by the test."""

    def user(self, user_id: str = OWNER, **metadata: str) -> Any:
        return TaskServiceStub(
            self.server.channel(user=user_id, metadata={key.replace("_", "-"): text for key, text in metadata.items()})
        )

    def webhooks(self, user_id: str = OWNER) -> Any:
        return WebhookServiceStub(self.server.channel(user=user_id))

    @property
    def worker(self) -> Any:
        return TaskServiceStub(self.server.channel(caller="media-worker"))

    def service(self, name: str) -> Any:
        return TaskServiceStub(self.server.channel(caller=name))

    async def create(self, **fields: Any) -> pb.Task:
        return await self.user().CreateTask(resize(**fields))

    async def claim(self) -> pb.ClaimTaskResponse.Assignment | None:
        answer = await self.worker.ClaimTask(pb.ClaimTaskRequest(pool="cpu", worker_id="worker-1"))
        return answer.assignment if answer.HasField("assignment") else None

    async def claimed(self) -> pb.Task:
        """Return the next task once it is due."""
        assignment = await eventually(self.claim)
        return assignment.task

    async def complete(self, task: pb.Task, file_id: str = "fil_result") -> None:
        await self.worker.CompleteTask(
            pb.CompleteTaskRequest(task_id=task.task_id, attempt=task.attempt, output_file_ids=[file_id])
        )

    async def fail(self, task: pb.Task, **how: bool) -> pb.Task.State:
        error = pb.Task.Error(code=3, message="The image is damaged.", reason="INPUT_DAMAGED")
        request = pb.FailTaskRequest(task_id=task.task_id, attempt=task.attempt, error=error, **how)
        return (await self.worker.FailTask(request)).state

    async def fence(self) -> int:
        """Have this replica keep house; those before are refused from now on."""
        async with self.database.transaction() as connection:
            return await lock.draw(connection, lock_table, FORGET)

    async def sent(self) -> list[Message]:
        """Return what is in the outbox."""
        async with self.database.reading() as connection:
            rows = await connection.execute(outbox_table.select().order_by(outbox_table.c.position))
            return [Message(row.exchange, row.routing_key, row.body, row.message_id) for row in rows]


Start = Callable[..., Awaitable[Replica]]


def resize(
    *,
    file_id: str = PHOTO,
    width: int = 800,
    request_id: str = "",
    deadline: timedelta | None = None,
    webhook_url: str = "",
) -> pb.CreateTaskRequest:
    operation = media_pb2.Operation(resize=media_pb2.Resize(width=width))
    limit = None if deadline is None else wire.duration(deadline)
    return pb.CreateTaskRequest(
        input_file_id=file_id,
        operation=operation,
        request_id=request_id,
        deadline_duration=limit,
        webhook_url=webhook_url,
    )


async def refused(call: Awaitable[Any]) -> MeshError:
    """Return what a call is refused with."""
    with pytest.raises(MeshError) as refusal:
        await call
    return refusal.value


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def users() -> Users:
    return Users()


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
async def url(new_database: NewDatabase) -> str:
    """Return the URL of a new database of tasks."""
    return await new_database("task")


@pytest.fixture
async def start(url: str, storage: Storage, users: Users, bus: Bus) -> AsyncIterator[Start]:
    """Start any number of replicas over one database."""
    async with AsyncExitStack() as stack:

        async def start(
            terms: Terms = BRISK,
            idle_seconds: float = 15.0,
            reader_seconds: float = READER_SECONDS,
            claims_wait_seconds: float = CLAIMS_WAIT_SECONDS,
        ) -> Replica:
            return await stack.enter_async_context(
                _replica(url, storage, users, bus, terms, idle_seconds, reader_seconds, claims_wait_seconds)
            )

        yield start


@pytest.fixture
async def replica(start: Start) -> Replica:
    return await start()


def _replica(
    url: str,
    storage: Storage,
    users: Users,
    bus: Bus,
    terms: Terms,
    idle_seconds: float,
    reader_seconds: float,
    claims_wait_seconds: float,
) -> AbstractAsyncContextManager[Replica]:
    @asynccontextmanager
    async def running() -> AsyncIterator[Replica]:
        async with (
            database.opened(url) as sql,
            serving(
                partial(storage_pb2_grpc.add_StorageServiceServicer_to_server, storage),
                partial(user_pb2_grpc.add_UserServiceServicer_to_server, users),
            ) as peers,
        ):
            clock, uptime, outbox = HeldClock(), [0.0], Outbox(sql, outbox_table)
            tasks = Interrupted(sql, outbox, convert.message_of, convert.hook_body)
            upkeep = Upkeep(tasks, bus, lambda: terms, monotonic=lambda: uptime[0])
            watches = Watches(tasks, clock, idle_seconds=idle_seconds)
            tasks.after_commit(watches.changed)
            peer = peers.channel(caller="task")
            hooks = WebhookService(SqlWebhooks(sql), [LOOPBACK])
            servicer = TaskService(
                tasks,
                watches,
                storage_pb2_grpc.StorageServiceStub(peer),
                user_pb2_grpc.UserServiceStub(peer),
                hooks,
                capability_key=KEY,
                terms=lambda: terms,
                is_unserved=upkeep.is_unserved,
                clock=clock,
                claims_wait_seconds=claims_wait_seconds,
            )
            work = [asyncio.create_task(each()) for each in watches.work(bus)]
            async with serving(
                partial(add_TaskServiceServicer_to_server, servicer),
                partial(add_WebhookServiceServicer_to_server, hooks),
                reader_seconds=reader_seconds,
            ) as server:
                yield Replica(server, tasks, watches, sql, outbox, clock, upkeep, uptime)
            for each in work:
                each.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    return running()
