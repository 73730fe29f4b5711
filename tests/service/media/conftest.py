"""A media worker with real child processes, between a task service and a storage that do as they are told."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from atelier.media.v1 import media_pb2
from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mesh import status
from mesh.broker import Delivery
from mesh.errors import Aborted, MeshError, NotFound, Unavailable
from services.media import peers, processes
from services.media.worker import weights
from services.media.worker.capacity import pools
from services.media.worker.tasks import Worker
from services.task.convert import pool_of
from tests.mesh_server import Server, serving
from tests.models import worker_config

LEASE_SECONDS = 3.0
PIECES = 20
# Some ten seconds of work: a photograph made 36 megapixels and an AVIF.
LONG = media_pb2.Operation(
    resize=media_pb2.Resize(width=6000, fit=media_pb2.Resize.FIT_FIT, format=media_pb2.FORMAT_AVIF)
)
SHORT = media_pb2.Operation(resize=media_pb2.Resize(width=100, format=media_pb2.FORMAT_WEBP))


class LeaseLost(Aborted):
    reason = "LEASE_LOST"


class StorageFull(Unavailable):
    reason = "STORAGE_FULL"


class UploadUndone(Aborted):
    reason = "UPLOAD_UNDONE"


class FileNotFound(NotFound):
    reason = "FILE_NOT_FOUND"


class Tasks(task_pb2_grpc.TaskServiceServicer):
    """Gives out what is queued and remembers what it is told."""

    def __init__(self) -> None:
        self.queued: list[task_pb2.Task] = []
        self.lost: set[str] = set()
        self.failure: MeshError | None = None
        self.claims = 0
        self.claim_seconds = 0.0
        """How long the answer to a claim is under way."""
        self.renewal_seconds = 0.0
        self.reports = 0
        self.refused_reports = 0
        """How many of the first reports come to nothing."""
        self.loses_answers = False
        """Whether reports take effect, and their answers are lost."""
        self.pools: list[str] = []
        self.renewals: list[task_pb2.RenewLeaseRequest] = []
        self.completed: dict[str, str] = {}
        self.failed: dict[str, task_pb2.FailTaskRequest] = {}
        self._numbers = itertools.count(1)

    def queue(self, operation: media_pb2.Operation = SHORT, file_id: str = "fil_rocket") -> str:
        task = task_pb2.Task(
            task_id=f"tsk_{next(self._numbers)}", attempt=1, input_file_id=file_id, operation=operation
        )
        self.queued.append(task)
        return task.task_id

    def stages(self, task_id: str) -> list[str]:
        return [each.progress.stage for each in self.renewals if each.task_id == task_id]

    async def ClaimTask(self, request, _):
        self.claims += 1
        if self.failure:
            raise self.failure
        if not self.queued:
            return task_pb2.ClaimTaskResponse()
        self.pools.append(request.pool)
        task = next((each for each in self.queued if pool_of(each.operation) == request.pool), None)
        if task is None:
            return task_pb2.ClaimTaskResponse()
        self.queued.remove(task)
        assignment = task_pb2.ClaimTaskResponse.Assignment(task=task, capability=f"may-{task.task_id}")
        assignment.lease_duration.FromMilliseconds(int(LEASE_SECONDS * 1000))
        more = any(pool_of(each.operation) == request.pool for each in self.queued)
        await asyncio.sleep(self.claim_seconds)
        return task_pb2.ClaimTaskResponse(assignment=assignment, more=more)

    async def RenewLease(self, request, _):
        self._require_lease(request.task_id)
        self.renewals.append(request)
        await asyncio.sleep(self.renewal_seconds)
        response = task_pb2.RenewLeaseResponse()
        response.lease_duration.FromMilliseconds(int(LEASE_SECONDS * 1000))
        return response

    async def CompleteTasks(self, request, _):
        self.reports += 1
        if self.failure or self.reports <= self.refused_reports:
            raise self.failure or Unavailable("Not now.")
        outcomes = [self._complete(each) for each in request.tasks]
        if self.loses_answers:
            raise Unavailable("The answer was lost.")
        return task_pb2.CompleteTasksResponse(outcomes=outcomes)

    def _complete(self, request: task_pb2.CompleteTaskRequest) -> status_pb2.Status:
        try:
            self._require_lease(request.task_id)
        except LeaseLost as refusal:
            return status.to_status(refusal)
        self.completed[request.task_id] = " ".join(request.output_file_ids)
        return status_pb2.Status()

    async def FailTask(self, request, _):
        self._require_lease(request.task_id)
        self.failed[request.task_id] = request
        return task_pb2.FailTaskResponse()

    def _require_lease(self, task_id: str) -> None:
        if self.failure:
            raise self.failure
        if task_id in self.lost:
            raise LeaseLost("Another attempt has the task.", metadata={"task_id": task_id})


class Storage(storage_pb2_grpc.StorageServiceServicer):
    """Has the photographs that scikit-image ships, by their stems, and what a test puts in."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("skimage")
        assert package is not None
        assert package.submodule_search_locations is not None
        photos = Path(package.submodule_search_locations[0]) / "data"
        self.inputs: dict[str, tuple[str, bytes]] = {
            f"fil_{path.stem}": (path.name, path.read_bytes())
            for path in (photos / "rocket.jpg", photos / "coffee.png", photos / "retina.jpg")
        }
        self.results: dict[str, tuple[str, str, bytes]] = {}
        self.discarded: list[str] = []
        self.reads: list[str] = []
        self.away = False
        self.full = False
        self.undone = 0  # so many results are refused as given up, from now on
        self.delay_seconds = 0.0
        self.asked = 0
        self.ignorance: MeshError | None = None
        self.making_seconds = 15

    async def read(self, request: Request) -> Response:
        self.reads.append(request.headers["x-atelier-capability"])
        if self.away:
            raise Unavailable("Away.")
        file_id = request.path_params["file_id"]
        if file_id not in self.inputs:
            raise FileNotFound(f"There is no file {file_id}.", metadata={"file_id": file_id})
        name, content = self.inputs[file_id]
        disposition = f"inline; filename=\"_\"; filename*=UTF-8''{quote(name)}"
        return StreamingResponse(self._trickling(content), headers={"content-disposition": disposition})

    async def _trickling(self, content: bytes) -> AsyncIterator[bytes]:
        """Yield a content in pieces, within `delay_seconds`: one that says nothing for long is given up."""
        step = 1 + len(content) // PIECES
        for start in range(0, len(content), step):
            await asyncio.sleep(self.delay_seconds / PIECES)
            yield content[start : start + step]

    async def write(self, request: Request) -> Response:
        content = await request.body()
        if self.full:
            raise StorageFull("Full.")
        if self.undone:
            self.undone -= 1
            raise UploadUndone("Given up.")
        capability = request.headers["x-atelier-capability"]
        index = request.query_params["index"]
        at = capability if index == "0" else f"{capability}-{index}"
        self.results[at] = (request.query_params["name"], request.headers["content-type"], content)
        return JSONResponse({"fileId": f"fil_of_{at}"})

    async def TakeResults(self, request, _):
        self.asked += 1
        if self.ignorance:
            raise self.ignorance
        # Nothing was made before.
        return storage_pb2.TakeResultsResponse(lease_duration=Duration(seconds=self.making_seconds))

    async def DiscardResult(self, request, _):
        self.discarded.append(request.capability)
        return storage_pb2.DiscardResultResponse()


class Permits:
    """Stands for the broker: hands out permits one by one, and again where they could not be used."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[int] = asyncio.Queue()
        self.waiting_for_models: asyncio.Queue[int] = asyncio.Queue()
        self.queues: list[str] = []
        self.returned = 0

    async def consume(self, queue: str, handler: Callable[[Delivery], Awaitable[None]], *, prefetch: int) -> None:
        self.queues.append(queue)
        waiting = self.waiting_for_models if queue == "media.gpu" else self.waiting
        while True:
            number = await waiting.get()
            handling = asyncio.ensure_future(handler(Delivery(b"", queue, str(number), {})))
            try:
                await asyncio.shield(handling)
            except asyncio.CancelledError:
                await asyncio.wait([handling])  # as the real one: what is being handled ends first
                raise
            except Unavailable:
                self.returned += 1
                waiting.put_nowait(number)
                await asyncio.sleep(0.05)


class Addresses:
    def __init__(self, *addresses: str) -> None:
        self.listed = list(addresses)

    def addresses(self) -> list[str]:
        return self.listed


@dataclass
class World:
    tasks: Tasks
    storage: Storage
    permits: Any
    server: Server
    data_dir: Path
    instances: Addresses
    slots: list[processes.Slot] = field(default_factory=list)
    running: asyncio.Task[None] | None = None

    def do(self, operation: media_pb2.Operation = SHORT, file_id: str = "fil_rocket") -> str:
        """Queue a task and give a permit for it."""
        task_id = self.tasks.queue(operation, file_id)
        waiting = self.permits.waiting_for_models if pool_of(operation) == "gpu" else self.permits.waiting
        waiting.put_nowait(1)
        return task_id

    async def stop(self) -> float:
        """Stop the worker as `serve` does after SIGTERM; return how long it took."""
        assert self.running is not None
        began = time.monotonic()
        self.running.cancel()
        await asyncio.wait([self.running])
        return time.monotonic() - began

    def left_behind(self) -> list[Path]:
        return list(self.data_dir.rglob("task/*"))


Start = Callable[..., Awaitable[World]]


@pytest.fixture
def permits() -> Permits:
    return Permits()


@pytest.fixture
async def start(tmp_path: Path, permits: Any) -> AsyncIterator[Start]:
    """Start a worker."""
    async with AsyncExitStack() as stack:
        tasks, files = Tasks(), Storage()
        rpc = "/atelier.storage.v1.StorageService"
        server = await stack.enter_async_context(
            serving(
                partial(task_pb2_grpc.add_TaskServiceServicer_to_server, tasks),
                partial(storage_pb2_grpc.add_StorageServiceServicer_to_server, files),
                http={f"{rpc}/ReadInput": files.read, f"{rpc}/WriteResult": files.write},
            )
        )

        async def started(slots: int = 1, drain_seconds: float = 0.3, **settings: Any) -> World:
            config = worker_config(tmp_path, slots=slots, **settings)
            opened = await stack.enter_async_context(processes.opened(config))
            dead = "127.0.0.1:9"  # one instance has just died and is still listed
            live = server.http_url.removeprefix("https://")
            instances = Addresses(dead, live)
            reading = await stack.enter_async_context(peers.opened(instances, server.tls("media-worker")))
            channel = server.channel(caller="media-worker")
            worker = Worker(
                task_pb2_grpc.TaskServiceStub(channel),
                storage_pb2_grpc.StorageServiceStub(channel),
                reading,
                opened,
                pools=pools(config, weights.described(config.weights_dir)),
                face_detector="",
                fonts=processes.fonts(),
                worker_id=config.instance,
                drain_seconds=drain_seconds,
            )
            world = World(tasks, files, permits, server, tmp_path, instances, opened)
            world.running = asyncio.create_task(worker.run(permits))
            stack.push_async_callback(world.stop)
            return world

        yield started
