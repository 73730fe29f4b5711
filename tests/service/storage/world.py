"""The storage service on real listeners, with a stub user and task service behind real gRPC."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import httpx
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub, add_StorageServiceServicer_to_server
from atelier.task.v1 import task_pb2, task_pb2_grpc
from atelier.user.v1 import user_pb2, user_pb2_grpc
from sqlalchemy import text

from mesh import capability, database, lock
from mesh.capability import Capability
from mesh.clock import SystemClock
from mesh.errors import FailedPrecondition, Internal, NotFound, ResourceExhausted, Unavailable
from services.storage.blobs import FolderBlobs
from services.storage.domain import SWEEP
from services.storage.handlers import StorageService
from services.storage.http import BytesEndpoints
from services.storage.keeping import Keeping
from services.storage.peers import MeshQuota, MeshTasks
from services.storage.repository import SqlFiles
from services.storage.tables import lock_table
from services.storage.upkeep import Upkeep
from tests import mesh_server

KEY = "0" * 64
LIMIT_BYTES = 1024 * 1024


class QuotaExceeded(ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


class ReservationReleased(FailedPrecondition):
    reason = "RESERVATION_RELEASED"


class Users(user_pb2_grpc.UserServiceServicer):
    """Keeps reservations as the user service promises to.

    `away`: out of reach, `silent`: gives no answer to a release, `is_old`: knows no charge at once and no release of
    what is still to come, `broken`: of which
    reservations no release succeeds.
    """

    def __init__(self) -> None:
        self.limit = 10 * LIMIT_BYTES
        self.reservations: dict[str, user_pb2.Reservation] = {}
        self.amounts: dict[str, int] = {}
        self.away = False
        self.silent = False
        self.is_old = False
        self.broken: set[str] = set()

    @property
    def used(self) -> dict[str, int]:
        """What is charged or reserved, by reservation."""
        return {
            name: self.amounts[name]
            for name, each in self.reservations.items()
            if each.state != user_pb2.Reservation.STATE_RELEASED
        }

    async def ReserveQuota(self, request, context):
        self._require_here()
        if request.reservation_id not in self.reservations:
            if sum(self.used.values()) + request.amount > self.limit:
                raise QuotaExceeded("Full.", metadata={"metric": "storage_bytes", "limit": str(self.limit)})
            self.reservations[request.reservation_id] = user_pb2.Reservation(
                reservation_id=request.reservation_id, state=user_pb2.Reservation.STATE_HELD
            )
            self.amounts[request.reservation_id] = request.amount
        reservation = self.reservations[request.reservation_id]
        if request.charge and not self.is_old:
            if reservation.state == user_pb2.Reservation.STATE_RELEASED:
                raise ReservationReleased("Given back.")
            reservation.state = user_pb2.Reservation.STATE_SETTLED
        elif reservation.state == user_pb2.Reservation.STATE_RELEASED:
            reservation.state = user_pb2.Reservation.STATE_HELD
        return reservation

    async def SettleQuota(self, request, context):
        self._require_here()
        self.reservations[request.reservation_id].state = user_pb2.Reservation.STATE_SETTLED
        return self.reservations[request.reservation_id]

    async def ReleaseQuota(self, request, context):
        self._require_here()
        if self.silent:
            await asyncio.Event().wait()
        if request.reservation_id in self.broken:
            raise Internal("Broken.")
        if request.reservation_id in self.reservations:
            self.reservations[request.reservation_id].state = user_pb2.Reservation.STATE_RELEASED
        elif request.user_id and not self.is_old:
            self.reservations[request.reservation_id] = user_pb2.Reservation(
                reservation_id=request.reservation_id, state=user_pb2.Reservation.STATE_RELEASED
            )
        return user_pb2.ReleaseQuotaResponse()

    def _require_here(self) -> None:
        if self.away:
            raise Unavailable("Away.")


class Tasks(task_pb2_grpc.TaskServiceServicer):
    """Answers LookupTask from `known`, and of `broken` tasks never."""

    def __init__(self) -> None:
        self.known: dict[str, task_pb2.LookupTaskResponse] = {}
        self.broken: set[str] = set()

    async def LookupTask(self, request, context):
        if request.task_id in self.broken:
            raise Internal("Broken.")
        if request.task_id not in self.known:
            raise NotFound("No such task.")
        return self.known[request.task_id]


class World:
    """One storage service and what stands around it."""

    def __init__(self, folder: Path, url: str, sql: database.Database, peers: mesh_server.Server) -> None:
        self.url = url
        self.sql = sql
        self.folder = folder
        self.files = SqlFiles(sql)
        self.blobs = FolderBlobs(folder)
        self.quota = MeshQuota(user_pb2_grpc.UserServiceStub(peers.channel(caller="storage")))
        self.judge = MeshTasks(task_pb2_grpc.TaskServiceStub(peers.channel(caller="storage")))
        self.keeping = Keeping(self.files, self.blobs, self.quota, self.judge)
        self.upkeep = Upkeep(self.files, self.blobs, self.keeping)
        self.users: Users
        self.tasks: Tasks
        self.server: mesh_server.Server

    async def elected(self) -> int:
        """Return the fence of a replica that sweeps from now on."""
        async with self.sql.transaction() as connection:
            return await lock.draw(connection, lock_table, SWEEP)

    def stub(self, user: str | None = "usr_ann", caller: str = "edge") -> StorageServiceStub:
        return StorageServiceStub(self.server.channel(user=user, caller=caller))

    def http(self, user: str | None = "usr_ann", caller: str = "edge", **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.server.http_url,
            headers={**mesh_server.headers(user), **headers},
            verify=self.server.tls(caller),
        )

    def worker(self, attempt: int = 1, **claims) -> httpx.AsyncClient:
        """A worker that holds the capability of an attempt at Ann's task."""
        return self.http(None, "media-worker", **{capability.CAPABILITY_KEY: granted(attempt, **claims)})

    async def upload(self, body: bytes, name: str = "a.txt", user: str = "usr_ann", **headers: str) -> httpx.Response:
        async with self.http(user, **headers) as http:
            return await http.post("/api/v1/files", params={"name": name}, content=body)

    async def age(self, seconds: int = 24 * 3600) -> None:
        """Let everything have happened `seconds` earlier."""
        async with self.sql.transaction() as connection:
            await connection.execute(text(f"UPDATE file SET create_time = create_time - {seconds * 1_000_000}"))
        age_files(self.folder, seconds)

    async def rows(self) -> dict[str, str]:
        """Every row's content, by its id, and everything that is not ready or owed under a name that stands out."""
        async with self.sql.reading() as connection:
            rows = (await connection.execute(text("SELECT file_id, sha256, ready FROM file"))).all()
            owed = (await connection.execute(text("SELECT file_id FROM debt"))).scalars().all()
        return {row.file_id if row.ready else f"not ready: {row.file_id}": row.sha256 for row in rows} | {
            f"owed: {each}": "" for each in owed
        }

    def contents(self) -> set[str]:
        """Every content in the folder, and every leftover."""
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return {"".join(path.parts) for path in paths}


def age_files(folder: Path, seconds: int = 24 * 3600) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            time = path.stat().st_mtime - seconds
            os.utime(path, (time, time))


def granted(
    attempt: int = 1,
    *,
    key: str = KEY,
    max_bytes: int = LIMIT_BYTES,
    inputs: tuple[str, ...] = (),
    task_id: str = "tsk_1",
    user_id: str = "usr_ann",
) -> str:
    return capability.sign(
        key,
        Capability(
            task_id=task_id,
            attempt=attempt,
            user_id=user_id,
            input_file_ids=inputs,
            max_bytes=max_bytes,
            expire_time=datetime.now(UTC) + timedelta(minutes=5),
        ),
    )


@asynccontextmanager
async def opened(tmp_path: Path, url: str) -> AsyncIterator[World]:
    """Open a world of its own in a folder, over a database of its own."""
    users, tasks = Users(), Tasks()
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(
            mesh_server.serving(
                partial(user_pb2_grpc.add_UserServiceServicer_to_server, users),
                partial(task_pb2_grpc.add_TaskServiceServicer_to_server, tasks),
            )
        )
        world = World(tmp_path / "blobs", url, await stack.enter_async_context(database.opened(url)), peers)
        world.users, world.tasks = users, tasks
        endpoints = BytesEndpoints(world.files, world.blobs, world.keeping, KEY, LIMIT_BYTES)
        servicer = StorageService(world.files, world.keeping, KEY, mesh_server.URL_KEY, SystemClock())
        world.server = await stack.enter_async_context(
            mesh_server.serving(partial(add_StorageServiceServicer_to_server, servicer), http=endpoints.by_rpc())
        )
        yield world
