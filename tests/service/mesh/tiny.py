"""A service with next to nothing in it, run as a process: `python -m tests.service.mesh.tiny <folder>`.

A test tells it what to do, and hears what it did, by files in the folder.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from atelier.mesh.v1 import identity_pb2
from atelier.task.v1 import task_pb2, task_pb2_grpc

from mesh import certificates
from mesh.service import serve
from tests.eventually import eventually
from tests.service.mesh.registry import Config


class Tasks(task_pb2_grpc.TaskServiceServicer):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def GetTask(self, request, _):
        (self._folder / "entered").touch()
        if request.task_id == "tsk_kept":
            return task_pb2.Task(task_id=str(gc.get_freeze_count()))
        if request.task_id == "tsk_thread":
            await asyncio.to_thread(time.sleep, 600)
        await eventually((self._folder / "finish").exists)
        return task_pb2.Task(task_id=request.task_id)

    async def WatchTask(self, request, _):
        while True:
            yield task_pb2.WatchTaskResponse(cursor="again")
            await asyncio.sleep(0.02)


class Feed:
    """Satisfies mesh.identity.IdentityFeed by a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def watch(self) -> AsyncIterator[identity_pb2.WatchIdentityResponse]:
        yield identity_pb2.WatchIdentityResponse(jwks=(self._folder / "jwks").read_text())
        await asyncio.Event().wait()


async def main(folder: Path) -> None:
    async def dependency() -> None:
        if (folder / "down").exists():
            raise ConnectionError
        if (folder / "late once").exists():
            (folder / "late once").rename(folder / "asked once")
            await asyncio.Event().wait()
        if (folder / "asked once").exists():
            (folder / "asked once").rename(folder / "asked again")
        if (folder / "late").exists():
            await asyncio.Event().wait()

    async def crashing() -> None:
        with (folder / "begun").open("a") as file:
            file.write("x")
        raise ValueError("background")

    config = Config()
    async with certificates.kept(config) as leaf:
        await serve(
            config,
            leaf,
            partial(task_pb2_grpc.add_TaskServiceServicer_to_server, Tasks(folder)),
            dependencies=[dependency],
            background=[crashing],
            identity=Feed(folder),
        )


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
