"""A service as a process: how it comes up, shows its health, and goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from atelier.task.v1 import task_pb2, task_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh import certificates, errors
from mesh.channel import MeshChannel
from mesh.intentions import FILE
from mesh.service import DEPENDENCY_SECONDS, PROPAGATION_SECONDS, STOP_SECONDS
from tests.authority import grpc_client, leaf
from tests.eventually import eventually
from tests.mesh_server import JWKS, headers
from tests.service.mesh.registry import Registry, config, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _People(MeshChannel):
    def _metadata(self) -> list[tuple[str, str]]:
        return list(headers("usr_1").items())


class Tiny:
    """The running process and its registry."""

    def __init__(self, folder: Path, registry: Registry, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.registry = registry
        self.process = process
        self.stack = AsyncExitStack()
        self._found: dict[str, Any] = {}

    async def registered(self) -> dict[str, Any]:
        """Return its registration, also after it has gone."""
        if not self._found:
            self._found = await eventually(lambda: self.registry.services.get("task-1"), within_seconds=15)
        return self._found

    async def health(self) -> int:
        async with grpc.aio.insecure_channel((await self.registered())["Check"]["grpc"]) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        return answer.status

    async def is_serving(self) -> bool:
        return await self.health() == SERVING

    async def is_not_serving(self) -> bool:
        return await self.health() == NOT_SERVING

    async def stub(self) -> task_pb2_grpc.TaskServiceStub:
        await eventually(self.is_serving)
        found = await self.registered()
        address = f"{found['Address']}:{found['Port']}"
        plain = grpc.aio.secure_channel(address, grpc_client(leaf("edge").present))
        self.stack.push_async_callback(plain.close)
        return task_pb2_grpc.TaskServiceStub(_People(plain))

    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines() if line.startswith("{")]

    def said(self) -> list[str]:
        return [str(line["message"]) for line in self.log()]


@asynccontextmanager
async def started(folder: Path, *, kept: str | None = "[]", forbids: bool = False, **more: str) -> AsyncIterator[Tiny]:
    """Run it, with the intentions of an earlier life; a registry that forbids does not tell it of others."""
    (folder / "jwks").write_text(JWKS)
    certificates.write(folder / "identity" / "task-1", leaf("task").present)
    if kept is not None:
        (folder / "identity" / "task-1" / FILE).write_text(kept)
    async with running() as registry:
        registry.forbids = forbids
        settings = config(folder, registry.url)
        environment = {
            "ATELIER_CONSUL_URL": registry.url,
            "ATELIER_BROKER_URL": settings.broker_url,
            "ATELIER_CONTROL_ADDRESSES": settings.control_addresses,
            "ATELIER_DATA_DIR": str(folder),
            "ATELIER_SECRETS_DIR": str(folder),
            "ATELIER_INSTANCE": settings.instance,
            "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
            **more,
        }
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.service.mesh.tiny", str(folder),
                env={**os.environ, **environment}, stdout=log, stderr=log,
            )  # fmt: skip
        tiny = Tiny(folder, registry, process)
        try:
            async with tiny.stack:
                yield tiny
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.fixture
async def tiny(tmp_path: Path) -> AsyncIterator[Tiny]:
    async with started(tmp_path) as made:
        yield made


GET = task_pb2.GetTaskRequest(task_id="tsk_1")
WATCH = task_pb2.WatchTaskRequest(task_id="tsk_1")


async def test_a_service_never_again_looks_for_garbage_in_what_its_start_made(tiny: Tiny) -> None:
    stub = await tiny.stub()

    kept = await stub.GetTask(task_pb2.GetTaskRequest(task_id="tsk_kept"))

    assert int(kept.task_id) > 10_000


async def test_health_is_what_the_dependencies_say_and_background_work_is_begun_again(tiny: Tiny) -> None:
    (tiny.folder / "down").touch()
    assert await tiny.health() == NOT_SERVING

    (tiny.folder / "down").unlink()
    await eventually(tiny.is_serving)

    (tiny.folder / "down").touch()
    await eventually(tiny.is_not_serving)
    assert tiny.process.returncode is None
    assert "now not serving: ConnectionError" in tiny.said()

    await eventually(lambda: len((tiny.folder / "begun").read_text()) >= 2)
    (crash, *_) = (line for line in tiny.log() if "crashed" in str(line["message"]))
    assert (crash["level"], crash["service"], crash["instance"]) == ("ERROR", "task", "task-1")
    assert "ValueError: background" in str(crash["exception"])


async def test_a_stop_takes_it_out_of_the_registry_finishes_calls_and_ends_streams(tiny: Tiny) -> None:
    stub = await tiny.stub()
    call = asyncio.create_task(stub.GetTask(GET))
    stream = stub.WatchTask(WATCH)
    await anext(stream)
    await eventually((tiny.folder / "entered").exists)

    tiny.process.send_signal(signal.SIGTERM)

    await eventually(lambda: "deregister task-1" in tiny.registry.events)
    assert await tiny.health() == NOT_SERVING
    assert (await anext(stream)).cursor == "again"  # deregistered first: its clients have not all heard of it
    with pytest.raises(errors.Unavailable) as ended:
        [each async for each in stream]
    assert ended.value.reason == "DRAINING"
    assert tiny.process.returncode is None
    (tiny.folder / "finish").touch()
    assert (await call).task_id == "tsk_1"
    assert await asyncio.wait_for(tiny.process.wait(), 5) == 0
    assert tiny.registry.services == {}
    assert tiny.said()[-1] == "stopped"


async def test_born_without_being_told_of_intentions_it_obeys_those_of_its_last_life(tmp_path: Path) -> None:
    kept = '[{"source": "edge", "destination": "*", "precedence": 6, "allows": false}]'
    async with started(tmp_path, kept=kept, forbids=True) as tiny:
        with pytest.raises(errors.PermissionDenied) as refused:
            await (await tiny.stub()).GetTask(GET)

    assert refused.value.reason == "CALLER_DENIED_BY_INTENTION"


async def test_it_does_not_serve_before_it_has_ever_heard_of_intentions(tmp_path: Path) -> None:
    async with started(tmp_path, kept=None, forbids=True) as tiny:
        await eventually(lambda: tiny.registry.matches, within_seconds=30)
        before = await tiny.health()

        tiny.registry.forbids = False

        await eventually(tiny.is_serving, within_seconds=30)
    assert before == NOT_SERVING
    assert (tmp_path / "identity" / "task-1" / FILE).read_text() == "[]"


async def test_a_stop_says_not_serving_before_it_leaves_the_registry(tiny: Tiny) -> None:
    await eventually(tiny.is_serving)
    tiny.registry.hangs = True  # so that the time between the two can be seen

    tiny.process.send_signal(signal.SIGTERM)

    await eventually(tiny.is_not_serving)
    assert "task-1" in tiny.registry.services
    assert await asyncio.wait_for(tiny.process.wait(), 10) == 0  # a registry that hangs holds up nobody


async def test_a_stop_closes_the_door_once_everybody_has_heard_and_then_finishes_what_is_under_way(tiny: Tiny) -> None:
    call = asyncio.create_task((await tiny.stub()).GetTask(GET))
    await eventually((tiny.folder / "entered").exists)
    found = await tiny.registered()

    tiny.process.send_signal(signal.SIGTERM)

    await eventually(lambda: _refuses(found), within_seconds=10)
    assert time.monotonic() - tiny.registry.deregistered_at >= PROPAGATION_SECONDS
    assert not call.done()
    (tiny.folder / "finish").touch()
    assert (await call).task_id == "tsk_1"
    assert await asyncio.wait_for(tiny.process.wait(), 5) == 0


async def _refuses(found: dict[str, Any]) -> bool:
    try:
        _, writer = await asyncio.open_connection(found["Address"], found["Port"])
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_a_hung_handler_is_given_drain_seconds_and_then_ended(tmp_path: Path) -> None:
    async with started(tmp_path, DRAIN_SECONDS="2") as tiny:
        call = asyncio.create_task((await tiny.stub()).GetTask(GET))
        await eventually((tmp_path / "entered").exists)
        tiny.process.send_signal(signal.SIGTERM)
        await eventually(lambda: "draining" in tiny.said())
        began = time.monotonic()

        with pytest.raises((errors.Unavailable, errors.Cancelled)):
            await call

        assert 2 <= time.monotonic() - began < 10
        assert await asyncio.wait_for(tiny.process.wait(), 10) == 0


async def test_a_stop_that_a_hung_thread_holds_up_ends_at_a_bound_of_its_own(tmp_path: Path) -> None:
    async with started(tmp_path, DRAIN_SECONDS="0.1") as tiny:
        call = asyncio.create_task((await tiny.stub()).GetTask(task_pb2.GetTaskRequest(task_id="tsk_thread")))
        await eventually((tmp_path / "entered").exists)

        tiny.process.send_signal(signal.SIGTERM)

        # Python itself waits for its threads, for as long as they take.
        assert await asyncio.wait_for(tiny.process.wait(), 4 * STOP_SECONDS) == -signal.SIGALRM
        with pytest.raises((errors.Unavailable, errors.Cancelled)):
            await call


async def test_a_late_dependency_counts_as_away_only_when_it_is_late_again(tiny: Tiny) -> None:
    await eventually(tiny.is_serving)

    (tiny.folder / "late once").touch()
    await eventually(lambda: not (tiny.folder / "late once").exists())
    await eventually((tiny.folder / "asked again").exists, within_seconds=3 * DEPENDENCY_SECONDS)
    assert not [line for line in tiny.said() if "did not answer" in line]

    (tiny.folder / "late").touch()
    await eventually(tiny.is_not_serving, within_seconds=6 * DEPENDENCY_SECONDS)


async def test_a_second_signal_ends_it_at_once(tiny: Tiny) -> None:
    call = asyncio.create_task((await tiny.stub()).GetTask(GET))
    await eventually((tiny.folder / "entered").exists)
    tiny.process.send_signal(signal.SIGTERM)
    await eventually(lambda: "draining" in tiny.said())

    began = time.monotonic()
    tiny.process.send_signal(signal.SIGTERM)

    assert await asyncio.wait_for(tiny.process.wait(), 5) == 1
    assert time.monotonic() - began < 1
    with pytest.raises(errors.Unavailable):
        await call
