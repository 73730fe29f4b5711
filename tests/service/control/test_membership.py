"""The control plane as a process, between a real Consul, a real Envoy and gRPC's own xDS client."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from atelier.mesh.v1 import identity_pb2, identity_pb2_grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mesh import channel, discovery
from mesh.config import ServiceConfig
from mesh.discovery import Registration
from mesh.service import PROPAGATION_SECONDS
from scripts.local import configs
from scripts.local.layout import Layout
from tests.authority import TRUST_DOMAIN, TestAuthority
from tests.eventually import eventually
from tests.ports import free_port
from tests.service.control.conftest import HOST, Keys, envoy_running

ROOT = Path(__file__).resolve().parents[3]
CONSUL = shutil.which("consul") or str(ROOT / "var" / "tools" / "consul")  # where scripts/test puts it

# In a process of its own, because gRPC reads its xDS bootstrap once a process. Prints who answered, for ever.
# Arguments: how many call at a time, and for which task.
CLIENT = """
import asyncio, sys
import grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc

async def main():
    credentials = grpc.xds_channel_credentials()
    async with grpc.aio.secure_channel("xds:///task", credentials) as channel:
        stub = task_pb2_grpc.TaskServiceStub(channel)

        async def caller():
            while True:
                try:
                    task = await stub.GetTask(task_pb2.GetTaskRequest(task_id=sys.argv[2]), timeout=5)
                    print(task.task_id, flush=True)
                except grpc.aio.AioRpcError as error:
                    print(error.code().name, flush=True)
                await asyncio.sleep(0.02)

        await asyncio.gather(*(caller() for _ in range(int(sys.argv[1]))))

asyncio.run(main())
"""


class StubTasks(task_pb2_grpc.TaskServiceServicer):
    """Answers with its own name; remembers how many asked at a time."""

    def __init__(self, name: str, ill: bool = False) -> None:
        self._name = name
        self._ill = ill
        self._present = 0
        self.most = 0
        self.port = 0
        self.health_address = ""

    async def GetTask(self, request, context):
        if self._ill:
            await context.abort(grpc.StatusCode.INTERNAL, "it passes its check, but that is all it does")
        self._present += 1
        self.most = max(self.most, self._present)
        try:
            await asyncio.sleep(0.3 if request.task_id == "slow" else 0)
            return task_pb2.Task(task_id=self._name)
        finally:
            self._present -= 1


class StubIdentity(identity_pb2_grpc.IdentityServiceServicer):
    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def WatchIdentity(self, request, context):
        yield identity_pb2.WatchIdentityResponse(jwks=self._keys.jwks)
        await asyncio.Event().wait()


@asynccontextmanager
async def program(*command: str, log: Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("a") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, cwd=ROOT, env={**os.environ, **environment}
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


class Mesh:
    """A registry, a control plane and an edge, each of which can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = Keys()
        self.consul_ports = {name: free_port() for name in ("http", "server", "serf_lan")}
        self.control_port = free_port()
        self.edge_port = free_port()
        self.layout = Layout(var=folder)
        configs.make_folders(self.layout)
        self.authority = TestAuthority()
        configs.write(self.layout.secrets / "connect.id", TRUST_DOMAIN)
        configs.write_root(self.layout, self.authority.root)
        self.secrets = configs.make_secrets(self.layout)
        self.edge = self.authority.leaf("edge", folder / "edge")
        self.environment = {
            "ATELIER_CONSUL_URL": f"http://{HOST}:{self.consul_ports['http']}",
            "ATELIER_BROKER_URL": "amqp://nowhere/",
            "ATELIER_CONTROL_ADDRESSES": f"{HOST}:{self.control_port}",
            "ATELIER_DATA_DIR": str(folder),
            "ATELIER_SECRETS_DIR": str(self.layout.secrets),
            "ATELIER_EDGE_SECRETS": str(folder),
            "ATELIER_EDGE_PORT": str(self.edge_port),
            "ATELIER_INSTANCE": "control-1",
            "CONTROL_ADDRESS": f"{HOST}:{self.control_port}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "generated")]),
        }

    def config(self, name: str = "task") -> ServiceConfig:
        class Config(ServiceConfig):
            service = name

        return Config(
            **{
                name: value
                for name, value in self.environment.items()
                if name.startswith("ATELIER") and not name.startswith("ATELIER_EDGE")
            }
        )

    @asynccontextmanager
    async def consul(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run Consul, and what keeps our tokens in it."""
        async with self.agent("consul", self.consul_ports) as process, self.registrar():
            yield process

    def agent(self, name: str, ports: dict[str, int], **settings: object):
        """Run a server of Consul."""
        told = {**configs.consul(self.layout, (1, 8), self.secrets), **settings}
        told["ports"] |= ports
        told["data_dir"] = str(self.layout.var / name)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(told))
        return program(CONSUL, "agent", "-config-file", str(path), log=self.folder / f"{name}.log")

    def registrar(self):
        environment = {**self.environment, "ATELIER_INSTANCE": "registrar"}
        return program(sys.executable, "-m", "mesh.registrar", log=self.folder / "registrar.log", **environment)

    def envoy(self, zone: str = ""):
        authority = self.layout.secrets / "ads-ca.pem"
        ports = [int(address.rpartition(":")[2]) for address in self.config().control_addresses.split(",")]
        return envoy_running(self.folder, *ports, own=self.edge, authority=authority, zone=zone)

    def control(self, **settings: str):
        environment = {**self.environment, **settings}
        return program(sys.executable, "-m", "mesh.control", log=self.folder / "control.log", **environment)

    async def put(self, key: str, value: object) -> None:
        """Write into Consul's KV; None deletes."""
        url, token = f"{self.environment['ATELIER_CONSUL_URL']}/v1/kv/", self.secrets["consul.operator"]
        async with httpx.AsyncClient(base_url=url, headers={"x-consul-token": token}) as client:
            answer = await (client.delete(key) if value is None else client.put(key, content=json.dumps(value)))
            assert answer.text.strip() == "true"

    @asynccontextmanager
    async def instance(
        self, name: str, service: str = "task", zone: str = "", ill: bool = False
    ) -> AsyncIterator[StubTasks]:
        """Run and register one instance of a service; an ill one passes its check and fails its callers."""
        server, health, tasks = grpc.aio.server(), HealthServicer(), StubTasks(name, ill)
        task_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(StubIdentity(self.keys), server)
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        port = server.add_secure_port(f"{HOST}:0", self.authority.leaf(service, self.folder / name).grpc_server())
        health_server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health, health_server)
        health_port = health_server.add_insecure_port(f"{HOST}:0")
        await server.start()
        await health_server.start()
        tasks.port, tasks.health_address = port, f"{HOST}:{health_port}"
        registration = Registration(service, name, HOST, port, tasks.health_address, {"zone": zone})
        async with discovery.registered(self.config(service), [registration]):
            yield tasks
        # As a real service does: it serves on until all have heard, and then finishes what is under way.
        await asyncio.sleep(PROPAGATION_SECONDS)
        await server.stop(1)
        await health_server.stop(None)

    def as_user(self, zone: str = "") -> dict[str, str]:
        """Return the environment in which a process calls as the service user."""
        config = self.config("user")
        config.instance, config.zone = "user-1", zone
        told = channel.environment(config, self.authority.leaf("user", self.folder / "user-1"))
        return {**os.environ, **self.environment, **told}

    @asynccontextmanager
    async def client(self, zone: str = "", callers: int = 1, task_id: str = "t") -> AsyncIterator[list[str]]:
        """Call `xds:///task` without end; yields who answered, or with what status nobody did."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, str(callers), task_id,
            stdout=asyncio.subprocess.PIPE, env=self.as_user(zone),
        )  # fmt: skip
        heard: list[str] = []

        async def listen() -> None:
            while line := await process.stdout.readline():
                heard.append(line.decode().strip())

        listening = asyncio.create_task(listen())
        try:
            yield heard
        finally:
            process.kill()
            await process.wait()
            listening.cancel()

    async def edge_answers(self, task_id: str = "t") -> str:
        """Return who answered one call through the edge, or its reason for not answering."""
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{self.edge_port}") as client:
            try:
                answer = (await client.get(f"/api/v1/tasks/{task_id}", headers=self.keys.bearer())).json()
            except httpx.TransportError as error:
                return type(error).__name__
            return answer["taskId"] if "taskId" in answer else answer["details"][0]["reason"]


@pytest.fixture
def mesh(tmp_path: Path) -> Mesh:
    return Mesh(tmp_path)


def only(heard: list[str], *expected: str) -> bool:
    """Tell whether the newest answers came from all of `expected` and from nobody else."""
    newest = heard[-20:]
    return len(newest) == 20 and set(newest) == set(expected)


async def edge_only(mesh: Mesh, *expected: str) -> bool:
    return {await mesh.edge_answers() for _ in range(8)} == set(expected)


async def test_instances_come_and_go_for_the_edge_and_for_grpc_clients(mesh: Mesh) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(mesh.consul())
        await stack.enter_async_context(mesh.control())
        await stack.enter_async_context(mesh.envoy())
        await stack.enter_async_context(mesh.instance("auth-1", "auth"))
        heard = await stack.enter_async_context(mesh.client())

        async with mesh.instance("task-1"):
            await eventually(lambda: only(heard, "task-1"), within_seconds=20)
            await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)
            async with mesh.instance("task-2"):
                await eventually(lambda: only(heard, "task-1", "task-2"), within_seconds=10)
                await eventually(lambda: edge_only(mesh, "task-1", "task-2"), within_seconds=10)
                before = len(heard)
            await eventually(lambda: only(heard, "task-1"), within_seconds=10)
            await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=10)
            assert "DEADLINE_EXCEEDED" not in heard[before:]
        await eventually(lambda: only(heard, "UNAVAILABLE"), within_seconds=10)
        await eventually(lambda: edge_only(mesh, "SERVICE_UNAVAILABLE"), within_seconds=10)


async def test_calls_go_on_while_consul_is_away_and_when_it_comes_back_empty(mesh: Mesh) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(mesh.envoy())
        await stack.enter_async_context(mesh.control())
        async with mesh.consul() as consul:
            await stack.enter_async_context(mesh.instance("auth-1", "auth"))
            await stack.enter_async_context(mesh.instance("task-1"))
            heard = await stack.enter_async_context(mesh.client())
            await eventually(lambda: only(heard, "task-1"), within_seconds=20)
            await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=10)
            heard.clear()
            consul.kill()
            await consul.wait()
            edges = [await mesh.edge_answers() for _ in range(20)]
        shutil.rmtree(mesh.layout.var / "consul")
        async with mesh.consul():
            for _ in range(40):  # four seconds, in which Consul is empty, then knows all as critical, then passing
                edges.append(await mesh.edge_answers())
                await asyncio.sleep(0.1)
            of_outage = {*heard, *edges}
            async with mesh.instance("task-2"):  # whoever followed the old one follows the new one
                await eventually(lambda: only(heard, "task-1", "task-2"), within_seconds=20)
                await eventually(lambda: edge_only(mesh, "task-1", "task-2"), within_seconds=20)

    assert of_outage == {"task-1"}


async def test_born_while_consul_is_down_it_serves_what_it_last_knew(mesh: Mesh) -> None:
    async with AsyncExitStack() as stack:
        async with mesh.consul(), mesh.envoy():
            await stack.enter_async_context(mesh.instance("task-1"))
            async with mesh.instance("auth-1", "auth"), mesh.control():
                await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)
            edges = [await mesh.edge_answers() for _ in range(20)]  # no auth and no control plane: all goes on

        # An Envoy that knows nothing, a control plane that knows what it kept, and neither Consul nor auth.
        await stack.enter_async_context(mesh.control())
        await stack.enter_async_context(mesh.envoy())
        heard = await stack.enter_async_context(mesh.client())
        await eventually(lambda: only(heard, "task-1"), within_seconds=20)
        await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)

    assert set(edges) == {"task-1"}
