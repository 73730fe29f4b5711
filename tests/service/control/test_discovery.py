"""Two control planes between a real Consul, a real Envoy and gRPC's own clients: what the registry does to them.

All tests share one mesh, in which two instances of task serve; each test leaves it so.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
import pytest
import pytest_asyncio

from mesh import discovery
from mesh.control import known
from mesh.control.plane import CALM_SECONDS
from tests.eventually import eventually
from tests.ports import free_port
from tests.service.control.conftest import HOST
from tests.service.control.test_membership import Mesh, edge_only, only

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class World:
    """The mesh that the tests share, and who calls in it without end."""

    mesh: Mesh
    controls: dict[str, asyncio.subprocess.Process]
    stack: AsyncExitStack
    heard: list[str] = field(default_factory=list)
    """What a gRPC client was answered."""
    edges: list[str] = field(default_factory=list)
    """What was answered at the edge."""

    async def start_control(self, name: str) -> None:
        port = int(self.mesh.config().control_addresses.split(",")[int(name[-1]) - 1].rpartition(":")[2])
        settings = {"ATELIER_INSTANCE": name, "CONTROL_ADDRESS": f"{HOST}:{port}"}
        self.controls[name] = await self.stack.enter_async_context(self.mesh.control(**settings))

    def serving(self, control: str = "control-1", service: str = "task") -> set[str]:
        """Return the instances of a service that a control plane tells of."""
        catalog = known.load(self.mesh.folder / f"{control}.json").catalog
        return {each.instance_id for each in catalog.get(service, ())}

    def published(self) -> int:
        """Return how many snapshots the control planes have published."""
        return (self.mesh.folder / "control.log").read_text().count('"published"')

    async def only(self, *names: str, within_seconds: float = 20) -> None:
        """Wait until both kinds of client are answered by all of `names` and by nobody else."""
        await eventually(lambda: only(self.heard, *names), within_seconds)
        await eventually(lambda: only(self.edges, *names), within_seconds)

    def registry(self) -> httpx.AsyncClient:
        """Return a client of Consul that may write everything."""
        token = self.mesh.secrets["consul.registrar"]
        url = f"{self.mesh.environment['ATELIER_CONSUL_URL']}/v1/"
        return httpx.AsyncClient(base_url=url, headers={"x-consul-token": token})


async def _call_the_edge(mesh: Mesh, edges: list[str]) -> None:
    url = f"http://{HOST}:{mesh.edge_port}/api/v1/"
    async with httpx.AsyncClient(base_url=url, headers=mesh.keys.bearer(lives_seconds=3600)) as client:
        while True:
            try:
                answer = await client.get("tasks/t")
                edges.append(answer.json()["taskId"] if answer.status_code == 200 else answer.text)
            except httpx.TransportError as error:
                edges.append(type(error).__name__)
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    mesh = Mesh(tmp_path_factory.mktemp("mesh"))
    mesh.environment["ATELIER_CONTROL_ADDRESSES"] = f"{HOST}:{mesh.control_port},{HOST}:{free_port()}"
    async with AsyncExitStack() as stack:
        made = World(mesh, {}, stack)
        await stack.enter_async_context(mesh.consul())
        await made.start_control("control-1")
        await made.start_control("control-2")
        await stack.enter_async_context(mesh.instance("auth-1", "auth"))
        await stack.enter_async_context(mesh.instance("task-1"))
        await stack.enter_async_context(mesh.instance("task-2"))
        for name in made.controls:  # whoever asks one that is not there yet waits long before he asks again
            await eventually(lambda name=name: made.serving(name) == {"task-1", "task-2"}, within_seconds=60)
        await stack.enter_async_context(mesh.envoy())
        made.heard = await stack.enter_async_context(mesh.client())
        await eventually(lambda: edge_only(mesh, "task-1", "task-2"), within_seconds=30)
        calling = asyncio.create_task(_call_the_edge(mesh, made.edges))
        yield made
        calling.cancel()
        with suppress(asyncio.CancelledError):
            await calling


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def well(world: World) -> None:
    await world.only("task-1", "task-2", within_seconds=30)


@asynccontextmanager
async def no_call_fails(world: World) -> AsyncIterator[None]:
    """Hold that every call is answered by an instance of task."""
    heard, edges = len(world.heard), len(world.edges)
    yield
    answers = {*world.heard[heard:], *world.edges[edges:]}
    assert {answer for answer in answers if not answer.startswith("task-")} == set()


async def test_one_control_plane_dies_and_all_hear_of_changes_from_the_other(world: World) -> None:
    async with no_call_fails(world):
        for name, killed in dict(world.controls).items():
            killed.kill()
            await killed.wait()

            async with world.mesh.instance("task-3"):
                await world.only("task-1", "task-2", "task-3")
            await world.only("task-1", "task-2")

            await world.start_control(name)
            await eventually(lambda name=name: world.serving(name) == {"task-1", "task-2"}, within_seconds=20)


async def test_a_third_instance_serves_its_third_of_the_calls_within_a_second_of_passing(world: World) -> None:
    async with no_call_fails(world), world.registry() as consul, world.mesh.instance("task-3"):

        async def passes() -> bool:
            return len((await consul.get("health/service/task?passing")).json()) == 3

        await eventually(passes, within_seconds=20)
        passed_at, heard, edges = time.monotonic(), len(world.heard), len(world.edges)
        await eventually(lambda: {"task-3"} <= {*world.heard[heard:]} & {*world.edges[edges:]}, within_seconds=3 * 1)
        print(f"the third instance serves after {time.monotonic() - passed_at:.2f} s")
        heard, edges = len(world.heard), len(world.edges)
        await eventually(lambda: len(world.heard) > heard + 30 and len(world.edges) > edges + 30, within_seconds=20)

        for answers in (world.heard[heard:][:30], world.edges[edges:][:30]):
            assert 9 <= answers.count("task-3") <= 11, answers


async def test_an_instance_that_flaps_fails_no_call_and_floods_nobody(world: World) -> None:
    flips, pause_seconds = 60, 0.05
    async with no_call_fails(world), world.registry() as consul, world.mesh.instance("task-3") as third:
        await world.only("task-1", "task-2", "task-3")
        await register(consul, "flapping", third.port, TTL="60s")
        before, began = world.published(), time.monotonic()

        for _ in range(flips // 2):
            await consul.put("agent/check/pass/service:flapping")
            await asyncio.sleep(pause_seconds)
            await consul.put("agent/check/fail/service:flapping")
            await asyncio.sleep(pause_seconds)

        elapsed_seconds = time.monotonic() - began
        await consul.put("agent/service/deregister/flapping")
        published = world.published() - before
    print(f"{published} snapshots of two control planes after {flips} flips in {elapsed_seconds:.1f} s")
    assert 4 <= published <= 2 * (elapsed_seconds / CALM_SECONDS + 1)


async def test_an_entry_that_leads_to_nobody_is_sent_no_call(world: World) -> None:
    port = free_port()
    async with no_call_fails(world), world.registry() as consul:
        await register(consul, "unchecked", port)
        await register(consul, "dead", port, GRPC=f"{HOST}:{port}", Interval="1s")
        async with world.mesh.instance("task-3"):  # once this is known, so are those
            await world.only("task-1", "task-2", "task-3")

            assert world.serving() == {"task-1", "task-2", "task-3"}
        for name in ("unchecked", "dead"):
            await consul.put(f"agent/service/deregister/{name}")


async def test_an_entry_that_leads_to_another_service_is_refused_by_its_certificate(world: World) -> None:
    async with no_call_fails(world), world.registry() as consul, world.mesh.instance("user-9", "user") as stranger:
        await register(consul, "ghost", stranger.port, GRPC=stranger.health_address, Interval="1s")
        await eventually(lambda: "ghost" in world.serving(), within_seconds=20)
        heard, edges = len(world.heard), len(world.edges)

        await eventually(lambda: len(world.heard) > heard + 60 and len(world.edges) > edges + 60, within_seconds=30)

        await consul.put("agent/service/deregister/ghost")
        assert stranger.most == 0  # of calls at a time


async def register(consul: httpx.AsyncClient, name: str, port: int, **check: str) -> None:
    """Write an instance of task into the registry by hand."""
    entry = {"Name": "task", "ID": name, "Address": HOST, "Port": port}
    answer = await consul.put("agent/service/register", json={**entry, "Check": check} if check else entry)
    assert answer.status_code == 200, answer.text


IDLER = """
import asyncio, sys
import grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc

async def main():
    credentials, options = grpc.xds_channel_credentials(), [("grpc.client_idle_timeout_ms", 1000)]
    async with grpc.aio.secure_channel("xds:///media", credentials, options=options) as channel:
        stub = task_pb2_grpc.TaskServiceStub(channel)
        print((await stub.GetTask(task_pb2.GetTaskRequest(), timeout=10, wait_for_ready=True)).task_id, flush=True)
        while channel.get_state() is not grpc.ChannelConnectivity.IDLE:
            await asyncio.sleep(0.1)
        print("idle", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(channel.get_state().name, flush=True)
        print((await stub.GetTask(task_pb2.GetTaskRequest(), timeout=10)).task_id, flush=True)

asyncio.run(main())
"""


async def test_a_channel_that_idled_while_every_instance_was_replaced_recovers(world: World) -> None:
    pipe = asyncio.subprocess.PIPE
    async with AsyncExitStack() as first, AsyncExitStack() as later:
        await first.enter_async_context(world.mesh.instance("media-1", "media"))
        await first.enter_async_context(world.mesh.instance("media-2", "media"))
        idler = await asyncio.create_subprocess_exec(
            sys.executable, "-c", IDLER, stdin=pipe, stdout=pipe, env=world.mesh.as_user()
        )
        told = [(await idler.stdout.readline()).decode().strip() for _ in range(2)]

        await later.enter_async_context(world.mesh.instance("media-3", "media"))
        await later.enter_async_context(world.mesh.instance("media-4", "media"))
        await eventually(lambda: {"media-3", "media-4"} <= world.serving(service="media"), within_seconds=20)
        await first.aclose()
        await eventually(lambda: world.serving(service="media") == {"media-3", "media-4"}, within_seconds=20)
        output, _ = await idler.communicate(b"go on\n")

    assert told[0] in {"media-1", "media-2"}
    assert told[1] == "idle"
    assert output.decode().split()[0] == "IDLE"  # it did not notice what happened
    assert output.decode().split()[1] in {"media-3", "media-4"}


async def test_a_registry_put_back_to_an_earlier_state_is_believed_and_followed_on(world: World) -> None:
    async with world.registry() as consul, discovery.followed("task", world.mesh.config()) as endpoints:

        async def index() -> int:
            return int((await consul.get("kv/faults/?recurse")).headers["x-consul-index"])

        await eventually(lambda: len(endpoints.addresses()) == 2, within_seconds=20)
        earlier = (await consul.get("snapshot")).content
        await world.mesh.put("faults/task", {"abort_code": "RESOURCE_EXHAUSTED", "abort_fraction": 1})
        await eventually(lambda: only(world.heard, "RESOURCE_EXHAUSTED"), within_seconds=20)
        before = await index()

        assert (await consul.put("snapshot", content=earlier)).status_code == 200

        await world.only("task-1", "task-2")
        assert await index() < before
        async with world.mesh.instance("task-3"):
            await world.only("task-1", "task-2", "task-3")
            await eventually(lambda: len(endpoints.addresses()) == 3, within_seconds=20)
        await eventually(lambda: len(endpoints.addresses()) == 2, within_seconds=20)
