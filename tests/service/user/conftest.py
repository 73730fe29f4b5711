"""The user service on a real server and database, between stub peers, under a clock that the test holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import pytest
from argon2 import PasswordHasher
from atelier.auth.v1 import auth_pb2, auth_pb2_grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc
from atelier.user.v1 import user_pb2, user_pb2_grpc

from mesh import database
from mesh.context import caller
from mesh.database import Database
from mesh.errors import MeshError, NotFound, Unavailable
from services.user.consumers import TaskEvents
from services.user.handlers import UserService
from services.user.passwords import Argon2Passwords
from services.user.repository import SqlAccounts, SqlQuotas
from services.user.upkeep import Upkeep
from tests.databases import NewDatabase
from tests.held_clock import HeldClock
from tests.mesh_server import Server, serving

ADMIN_SECRET = "5ecret"


@dataclass
class StubAuth(auth_pb2_grpc.AuthServiceServicer):
    """Opens sessions for whom it is asked to, and remembers whom."""

    opened: list[tuple[str, str, str]] = field(default_factory=list)
    generations: list[str] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)
    failure: MeshError | None = None
    refused: str = ""  # a generation that is never revoked

    async def IssueTokens(self, request, context):
        if self.failure:
            raise self.failure
        self.opened.append((caller(), request.user_id, request.role))
        self.generations.append(request.generation)
        return auth_pb2.Tokens(access_token="access", refresh_token="refresh")

    async def RevokeGeneration(self, request, context):
        if self.failure or request.generation == self.refused:
            raise self.failure or Unavailable("for ever")
        self.revoked.append(request.generation)
        return auth_pb2.RevokeGenerationResponse()


@dataclass
class StubTasks(task_pb2_grpc.TaskServiceServicer):
    """Knows the tasks that a test puts in."""

    known: dict[str, task_pb2.LookupTaskResponse] = field(default_factory=dict)
    failure: MeshError | None = None
    refused: str = ""  # a task about which nothing is ever said
    asked: int = 0

    async def LookupTask(self, request, context):
        self.asked += 1
        if self.failure or request.task_id == self.refused:
            raise self.failure or Unavailable("for ever")
        if request.task_id not in self.known:
            raise NotFound("no such task")
        return self.known[request.task_id]


@dataclass
class Home:
    """What a test of the user service needs at hand."""

    server: Server
    sql: Database
    accounts: SqlAccounts
    quotas: SqlQuotas
    auth: StubAuth
    tasks: StubTasks
    clock: HeldClock
    events: TaskEvents
    upkeep: Upkeep

    def stub(self, user: str | None = None, role: str = "ROLE_USER", caller: str = "edge"):
        return user_pb2_grpc.UserServiceStub(self.server.channel(user, role, caller))

    async def registered(self, username: str = "ada", password: str = "correct horse") -> user_pb2.User:
        return await self.stub().RegisterUser(
            user_pb2.RegisterUserRequest(username=username, email=f"{username}@example.com", password=password)
        )

    async def reserve(
        self, user_id: str, reservation_id: str, amount: int = 1, *, storage: bool = False, charge: bool = False
    ):
        kind = user_pb2.ReserveQuotaRequest.KIND_STORAGE_BYTES if storage else user_pb2.ReserveQuotaRequest.KIND_TASKS
        return await self.stub(caller="storage" if storage else "task").ReserveQuota(
            user_pb2.ReserveQuotaRequest(
                reservation_id=reservation_id, user_id=user_id, kind=kind, amount=amount, charge=charge
            )
        )

    async def reserve_all(self, user_id: str, reservation_ids: list[str], caller: str = "task"):
        kind = user_pb2.ReserveQuotaRequest.KIND_TASKS
        request = user_pb2.ReserveQuotasRequest(reservation_ids=reservation_ids, user_id=user_id, kind=kind, amount=1)
        return (await self.stub(caller=caller).ReserveQuotas(request)).reservations

    async def quota(self, user_id: str) -> user_pb2.Quota:
        return await self.stub(user_id).GetQuota(user_pb2.GetQuotaRequest(user_id="me"))


@pytest.fixture
async def home(new_database: NewDatabase) -> AsyncIterator[Home]:
    url = await new_database("user")
    auth, tasks, clock = StubAuth(), StubTasks(), HeldClock(datetime(2026, 10, 30, 12, 0, tzinfo=UTC))
    async with (
        database.opened(url) as sql,
        serving(partial(auth_pb2_grpc.add_AuthServiceServicer_to_server, auth)) as auth_server,
        serving(partial(task_pb2_grpc.add_TaskServiceServicer_to_server, tasks)) as task_server,
    ):
        accounts, quotas = SqlAccounts(sql), SqlQuotas(sql)
        tokens = auth_pb2_grpc.AuthServiceStub(auth_server.channel(caller="user"))
        task = task_pb2_grpc.TaskServiceStub(task_server.channel(caller="user"))
        users = UserService(
            accounts,
            quotas,
            Argon2Passwords(),
            tokens,
            task,
            admin_secret=ADMIN_SECRET,
            clock=clock,
        )
        upkeep = Upkeep(accounts, quotas, task, tokens, clock)
        async with serving(partial(user_pb2_grpc.add_UserServiceServicer_to_server, users)) as server:
            yield Home(server, sql, accounts, quotas, auth, tasks, clock, TaskEvents(quotas, clock), upkeep)
        # Whatever a test did, the counters are the sum of the ledger, and of what reservations stand for.
        assert await quotas.audit() == []


@pytest.fixture
def old_hash() -> str:
    """Return the hash of `correct horse` with parameters that were enough once."""
    return PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1).hash("correct horse")
