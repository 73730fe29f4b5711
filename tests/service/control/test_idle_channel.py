"""R-12: a channel that was idle while every replica was replaced makes its first call as if nothing had been."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from mesh import channel
from tests.eventually import eventually
from tests.service.control.test_membership import Mesh

# In a process of its own, because gRPC reads its xDS bootstrap once a process. Does what it reads, a word a line:
# `call` prints who answered, `idle` waits until the channel has closed its connections.
CLIENT = """
import asyncio, sys
import grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc
from mesh.channel import OPTIONS

IDLE_MILLISECONDS = 2000  # of half an hour by default

async def main():
    credentials = grpc.xds_channel_credentials()
    options = [*OPTIONS, ("grpc.client_idle_timeout_ms", IDLE_MILLISECONDS)]
    async with grpc.aio.secure_channel("xds:///task", credentials, options=options) as channel:
        stub = task_pb2_grpc.TaskServiceStub(channel)
        while word := (await asyncio.to_thread(sys.stdin.readline)).strip():
            if word == "idle":
                while (state := channel.get_state()) != grpc.ChannelConnectivity.IDLE:
                    await channel.wait_for_state_change(state)
                print("idle", flush=True)
                continue
            try:
                print((await stub.GetTask(task_pb2.GetTaskRequest(task_id="t"), timeout=5)).task_id, flush=True)
            except grpc.aio.AioRpcError as error:
                print(error.code().name, flush=True)

asyncio.run(main())
"""


class Client:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def does(self, word: str) -> str:
        """Return what it answers to a word."""
        self._process.stdin.write(f"{word}\n".encode())
        return (await asyncio.wait_for(self._process.stdout.readline(), 30)).decode().strip()


@asynccontextmanager
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    config = mesh.config("user")
    config.instance = "user-1"
    bootstrap = channel.bootstrap(config, mesh.authority.leaf("user", mesh.folder / "user-1"))
    environment = {**os.environ, **mesh.environment, "GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap)}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, stdin=pipe, stdout=pipe, env=environment
    )  # fmt: skip
    try:
        yield Client(process)
    finally:
        process.kill()
        await process.wait()


async def test_r12_the_first_call_of_an_idle_channel_succeeds_though_every_replica_was_replaced(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path)
    async with AsyncExitStack() as stack:
        hold = stack.enter_async_context
        await hold(mesh.consul())
        await hold(mesh.control())
        await hold(mesh.instance("auth-1", "auth"))
        calling = await hold(client(mesh))
        async with mesh.instance("task-1"), mesh.instance("task-2"):

            async def answered() -> bool:
                return await calling.does("call") in ("task-1", "task-2")

            await eventually(answered, within_seconds=30)
            assert await calling.does("idle") == "idle"
        await hold(mesh.instance("task-3"))
        await hold(mesh.instance("task-4"))
        await eventually(lambda: published(mesh) == 2, within_seconds=20)

        assert await calling.does("call") in ("task-3", "task-4")


def published(mesh: Mesh) -> int:
    """Return how many instances of the task service the control plane has told of last."""
    lines = [json.loads(line) for line in (mesh.folder / "control.log").read_text().splitlines() if line[:1] == "{"]
    return [line["instances"]["task"] for line in lines if line["message"] == "published"][-1]
