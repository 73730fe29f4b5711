"""Two control planes between a real Consul, a real Envoy and gRPC's own clients: what the registry does to them.

All tests share one mesh, in which two instances of task serve; each test leaves it so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
import pytest
import pytest_asyncio

from mesh.control import known
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

    def serving(self, name: str = "control-1") -> set[str]:
        """Return the instances of task that a control plane tells of."""
        catalog = known.load(self.mesh.folder / f"{name}.json").catalog
        return {each.instance_id for each in catalog.get("task", ())}

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
                answer = (await client.get("tasks/t")).json()
                edges.append(answer["taskId"] if "taskId" in answer else answer["details"][0]["reason"])
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
