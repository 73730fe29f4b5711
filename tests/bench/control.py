"""The control plane under 1,000 instances and 500 clients: how fast a change arrives, and what it costs."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import httpx
import psutil
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from mesh.control.snapshot import CLUSTER, ENDPOINTS, LISTENER, ROUTES
from tests.bench.report import Figures, arguments, tell
from tests.eventually import eventually
from tests.service.control.test_membership import Mesh

SERVICES = 50
FOLLOWED = 5  # services that one client calls; the first of them is the same for all, as auth is
SIZES = ((100, 500), (300, 500), (1000, 500), (1000, 100))  # instances, clients
QUIET_SECONDS = 0.5  # nothing has come for so long: all is told

HOW = (
    f"A real Consul with simulated instances of {SERVICES} services in its catalog, the control plane as a process, "
    f"and clients that are xDS streams of one process, on a connection each, each following {FOLLOWED} services "
    "(listener, routes, cluster, endpoints), one of them the same for all. A round: one instance of a service "
    "fails its check. `told`: from the write to Consul to the last client's acknowledgement, of a service that "
    "all follow, and of one that a tenth follow. CPU: of the control plane, for a change of the former. The ratio is "
    "to a control plane that sends everyone everything at each change: bytes of that to bytes of ours."
)


def service_name(number: int) -> str:
    return f"sim-{number % SERVICES:02d}"


class Client:
    """An xDS client that acknowledges everything and remembers when, and how many bytes it was sent."""

    def __init__(self, number: int, target: str, credentials: grpc.ChannelCredentials) -> None:
        self._credentials = credentials
        others = (1 + (number * (FOLLOWED - 1) + step) % (SERVICES - 1) for step in range(FOLLOWED - 1))
        self.names = [service_name(0), *map(service_name, others)]
        self.received_bytes = 0
        self.endpoints_at = 0.0
        self._node = {"id": f"sim-{number}", "cluster": "sim"}
        self._target = target

    async def follow(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(self._target, self._credentials, options=options) as channel:
            stream = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).StreamAggregatedResources(wait_for_ready=True)
            for type_url in (LISTENER, ROUTES, CLUSTER, ENDPOINTS):
                await stream.write(self._request(type_url))
            async for response in stream:
                self.received_bytes += response.ByteSize()
                await stream.write(self._request(response.type_url, response.version_info, response.nonce))
                if response.type_url == ENDPOINTS:
                    self.endpoints_at = time.perf_counter()

    def _request(self, type_url: str, version: str = "", nonce: str = "") -> discovery_pb2.DiscoveryRequest:
        return discovery_pb2.DiscoveryRequest(
            type_url=type_url, resource_names=self.names, version_info=version, response_nonce=nonce, node=self._node
        )


class Registry:
    """Consul's catalog, written to directly: an instance is an entry, not a process."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def put(self, number: int, status: str = "passing") -> None:
        name = f"{service_name(number)}-{number}"
        answer = await self._client.put(
            "/v1/catalog/register",
            json={
                "Node": "simulated", "Address": "127.0.0.2", "SkipNodeUpdate": number > 0,
                "Service": {
                    "ID": name, "Service": service_name(number), "Address": f"10.0.{number // 250}.{number % 250}",
                    "Port": 9000, "Meta": {"version": "0.1.0"},
                },
                "Check": {"CheckID": f"check:{name}", "ServiceID": name, "Name": name, "Status": status},
            },
        )  # fmt: skip
        answer.raise_for_status()


async def answering(client: httpx.AsyncClient) -> bool:
    """Tell whether Consul has a leader."""
    return len((await client.get("/v1/status/leader")).text) > 2


@asynccontextmanager
async def connected(count: int, target: str, credentials: grpc.ChannelCredentials) -> AsyncIterator[list[Client]]:
    """Hold clients that have been told everything."""
    clients = [Client(number, target, credentials) for number in range(count)]
    tasks = [asyncio.create_task(client.follow()) for client in clients]
    try:
        await eventually(lambda: all(client.endpoints_at for client in clients), within_seconds=60)
        await quiet(clients)
        yield clients
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def quiet(clients: Iterable[Client]) -> None:
    """Wait until nothing more comes."""
    last = -1
    while (received := sum(client.received_bytes for client in clients)) != last:
        last = received
        await asyncio.sleep(QUIET_SECONDS)


async def change(registry: Registry, clients: list[Client], number: int, status: str) -> tuple[float, int]:
    """Change one instance; return milliseconds until its service's last follower knows, and bytes sent to all."""
    followers = [client for client in clients if service_name(number) in client.names]
    before = sum(client.received_bytes for client in clients)
    began = time.perf_counter()
    await registry.put(number, status)
    await eventually(lambda: all(client.endpoints_at > began for client in followers), within_seconds=30)
    taken = max(client.endpoints_at for client in followers) - began
    await quiet(clients)
    return taken * 1000, sum(client.received_bytes for client in clients) - before


def cpu_seconds(control: psutil.Process) -> float:
    times = control.cpu_times()
    return times.user + times.system


async def measure(rounds: int) -> tuple[list[Figures], float]:
    """Return the figures of each size, and how much more a control plane would send that sends everything."""
    contestants = []
    ratio = 0.0
    for instances, count in SIZES:
        figures = Figures(f"{instances:,} / {count}")
        async with AsyncExitStack() as stack:
            mesh = Mesh(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            await stack.enter_async_context(mesh.consul())
            token = {"x-consul-token": mesh.secrets["consul.registrar"]}
            own, trusted = mesh.authority.pems("sim"), (mesh.layout.secrets / "ads-ca.pem").read_bytes()
            credentials = grpc.ssl_channel_credentials(trusted, own.key, own.certificate)
            client = await stack.enter_async_context(
                httpx.AsyncClient(base_url=mesh.environment["ATELIER_CONSUL_URL"], headers=token, timeout=30)
            )
            registry = Registry(client)
            await eventually(partial(answering, client), within_seconds=20)
            for number in range(instances):
                await registry.put(number)
            control = psutil.Process((await stack.enter_async_context(mesh.control())).pid)
            clients = await stack.enter_async_context(connected(count, f"127.0.0.1:{mesh.control_port}", credentials))
            everything = sum(client.received_bytes for client in clients)
            for number in range(rounds):
                status = ("critical", "passing")[number % 2]
                spent = cpu_seconds(control)
                for_all_ms, for_all_bytes = await change(registry, clients, 0, status)
                spent = cpu_seconds(control) - spent
                for_few_ms, for_few_bytes = await change(registry, clients, 7, status)
                figures.add(
                    told_all=for_all_ms,
                    told_a_tenth=for_few_ms,
                    cpu=spent * 1000,
                    sent_to_all=for_all_bytes / 1024,
                    sent_to_a_tenth=for_few_bytes / 1024,
                    memory=control.memory_full_info().pss / 1024**2,
                )
            if (instances, count) == (1000, 500):
                ratio = everything / 1024 / figures.median("sent_to_all")
        contestants.append(figures)
    return contestants, ratio


def main() -> None:
    options = arguments(__doc__ or "", rounds=6)
    contestants, ratio = asyncio.run(measure(options.rounds))
    tell(
        "The control plane: a change, by instances / clients",
        HOW,
        contestants,
        {
            "told_all": "ms",
            "told_a_tenth": "ms",
            "cpu": "ms",
            "sent_to_all": "KiB",
            "sent_to_a_tenth": "KiB",
            "memory": "MiB",
        },
        {"resending_everything": [ratio]},
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
