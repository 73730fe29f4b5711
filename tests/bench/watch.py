"""2,000 watchers on one replica of the task service: what each costs, and how soon the last has the news."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psutil
from atelier.task.v1 import task_pb2, task_pb2_grpc

from tests.bench.report import Figures, arguments, tell
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.people import Person, registered
from tests.photographs import photograph

WATCHERS = 2_000
MOST_KIB = 60  # of the task service, a watcher
BATCH = 1_000  # the contract's most
STREAMS = 100  # of one connection to the edge
UNLIMITED = {"CONTROL_RATE_READ": "1000000:1000000", "CONTROL_RATE_WRITE": "1000000:1000000"}

HOW = (
    f"`WatchTask` by gRPC through the edge, {WATCHERS:,} streams of a process over {WATCHERS // STREAMS} connections; "
    "one replica of each service, SQLite. All watch one task, or each a task of its own; the tasks are queued, no "
    "worker runs. Memory is resident memory of the task service's process, of Envoy's, with the watchers less "
    "without, a watcher. The news is a cancellation, of the task or of all by their batch; its time is from its call "
    "to the last watcher's end, so that the client's own work for its streams is in it."
)


class Watchers:
    """Watchers who have been told how things stand, and wait for news."""

    def __init__(self, stubs: Sequence[task_pb2_grpc.TaskServiceStub], token: str) -> None:
        self._stubs = stubs
        self._metadata = [("authorization", f"Bearer {token}")]
        self.told = 0
        self.ended = 0

    async def watch(self, number: int, task_id: str) -> None:
        stub = self._stubs[number % len(self._stubs)]
        stream = stub.WatchTask(task_pb2.WatchTaskRequest(task_id=task_id), metadata=self._metadata)
        first = True
        async for _ in stream:
            self.told += first
            first = False
        self.ended += 1


@asynccontextmanager
async def watching(mesh: Mesh, person: Person, task_ids: Sequence[str]) -> AsyncIterator[Watchers]:
    """Hold a watcher of each of `task_ids`."""
    async with AsyncExitStack() as stack:
        stubs = []
        for number in range(WATCHERS // STREAMS):
            options = [("grpc.use_local_subchannel_pool", 1), ("atelier.number", number)]
            channel = grpc.aio.insecure_channel(urlsplit(mesh.url).netloc, options=options)
            stubs.append(task_pb2_grpc.TaskServiceStub(await stack.enter_async_context(channel)))
        await person.sign_in()  # a token lives five minutes
        watchers = Watchers(stubs, person.http.headers["authorization"].removeprefix("Bearer "))
        async with asyncio.TaskGroup() as tasks:
            for number, task_id in enumerate(task_ids):
                tasks.create_task(watchers.watch(number, task_id))
            await eventually(lambda: watchers.told == len(task_ids), within_seconds=60)
            yield watchers


async def queued(person: Person, file_id: str, count: int) -> tuple[list[str], list[str]]:
    """Queue tasks; return the ids of their batches, and their own."""
    batch_ids, task_ids = [], []
    for start in range(0, count, BATCH):
        items = [{"inputFileId": file_id, "operation": {"resize": {"width": 32}}}] * min(BATCH, count - start)
        batch = (await asked(person, "POST", f"{person.http.base_url}tasks:batch", json={"items": items}))["batchId"]
        page: dict[str, Any] = {"nextPageToken": ""}
        while page["nextPageToken"] or "tasks" not in page:
            query = {"batchId": batch, "pageSize": 200, "pageToken": page["nextPageToken"]}
            page = await asked(person, "GET", "tasks", params=query)
            task_ids += [task["taskId"] for task in page["tasks"]]
        batch_ids.append(batch)
    return batch_ids, task_ids


async def asked(person: Person, verb: str, path: str, **what: Any) -> dict[str, Any]:
    """Return the answer to a call, which must succeed."""
    answer = await person.http.request(verb, path, **what)
    answer.raise_for_status()
    return answer.json()


async def measure(mesh: Mesh, rounds: int) -> list[Figures]:
    replica = psutil.Process(*mesh.pids("task").values())
    [edge] = psutil.Process(mesh.pid("envoy")).children()  # it is started by a process that replaces it
    [worker] = map(psutil.Process, mesh.pids("media-worker").values())
    one, own = Figures("of one task"), Figures("each of its own")
    async with registered(mesh.url) as person:
        login = {"login": person.username, "secret": mesh.secret("admin")}
        await asked(person, "POST", f"{mesh.url}/api/v1/users:grantAdmin", json=login)
        await person.sign_in()
        limits = {"tasks": (rounds + 1) * (WATCHERS + 1)}
        await asked(person, "POST", f"users/{person.user_id}/quota:set", json=limits)
        path = photograph()
        file = await asked(person, "POST", "files", params={"name": path.name}, content=path.read_bytes())
        worker.suspend()
        try:
            before = memory_of(replica), memory_of(edge)
            for _ in range(rounds):
                for figures, count in ((one, 1), (own, WATCHERS)):
                    batch_ids, task_ids = await queued(person, file["fileId"], count)
                    async with watching(mesh, person, task_ids * (WATCHERS // count)) as watchers:
                        memory = [
                            now - then for now, then in zip((memory_of(replica), memory_of(edge)), before, strict=True)
                        ]
                        began = time.perf_counter()
                        for batch_id in batch_ids:
                            await asked(person, "POST", f"task-batches/{batch_id}:cancel", json={})
                        await eventually(lambda seen=watchers: seen.ended == WATCHERS, within_seconds=60)
                        news = time.perf_counter() - began
                    figures.add(
                        memory=memory[0] / WATCHERS / 1024, memory_of_the_edge=memory[1] / WATCHERS / 1024, news=news
                    )
        finally:
            worker.resume()
    return [one, own]


def memory_of(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def main() -> None:
    options = arguments(__doc__ or "", rounds=3)
    with tempfile.TemporaryDirectory() as name, running(Path(name) / "var", settings=UNLIMITED) as mesh:
        contestants = asyncio.run(measure(mesh, options.rounds))
    tell(
        f"{WATCHERS:,} watchers of one replica, a watcher",
        HOW,
        contestants,
        {"memory": "KiB", "memory_of_the_edge": "KiB", "news": "s"},
        {},
        as_json=options.json,
    )
    if (most := max(each.median("memory") for each in contestants)) > MOST_KIB:
        sys.exit(f"A watcher takes {most:.0f} KiB of the task service; {MOST_KIB} are the most.")


if __name__ == "__main__":
    main()
