"""How a control plane goes: as a service does, and without taking from its clients what they know."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import grpc
import httpx
import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from mesh import status
from mesh.control.snapshot import CLUSTER
from mesh.errors import MeshError
from tests.eventually import eventually
from tests.service.control.test_membership import HOST, Mesh, edge_only, only


@pytest.fixture
def mesh(tmp_path: Path) -> Mesh:
    return Mesh(tmp_path)


async def control_planes(mesh: Mesh) -> list[str]:
    """Return the control planes that the registry has, passing."""
    async with httpx.AsyncClient(headers={"x-consul-token": mesh.secrets["consul.operator"]}) as client:
        answer = await client.get(f"{mesh.environment['ATELIER_CONSUL_URL']}/v1/health/service/control?passing=1")
    return [each["Service"]["ID"] for each in answer.json()]


async def followed(mesh: Mesh) -> tuple[grpc.aio.Channel, grpc.aio.StreamStreamCall]:
    """Return a channel to the control plane, and a stream on it that has been told something."""
    own = mesh.authority.leaf("user", mesh.folder / "user-1").present
    trusted = (mesh.layout.secrets / "ads-ca.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(trusted, own.key, own.certificate)
    connected = grpc.aio.secure_channel(f"{HOST}:{mesh.control_port}", credentials)
    stream = ads_pb2_grpc.AggregatedDiscoveryServiceStub(connected).StreamAggregatedResources()
    node = base_pb2.Node(id="user-1", cluster="user")
    await stream.write(discovery_pb2.DiscoveryRequest(node=node, type_url=CLUSTER))
    told = await asyncio.wait_for(stream.read(), 20)
    assert told.type_url == CLUSTER
    return connected, stream


async def test_a_control_plane_that_stops_leaves_the_registry_then_sends_its_clients_to_another(mesh: Mesh) -> None:
    async with mesh.consul(), mesh.control() as control:
        await eventually(lambda: control_planes(mesh), within_seconds=20)
        channel, stream = await followed(mesh)
        began = time.monotonic()

        control.send_signal(signal.SIGTERM)

        async def deregistered() -> bool:
            return not await control_planes(mesh)

        await eventually(deregistered)
        assert control.returncode is None
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await read_out(stream)
        assert told(ended.value).reason == "DRAINING"
        assert await asyncio.wait_for(control.wait(), 10) == 0  # though a client's stream has no end of its own
        assert time.monotonic() - began < 10
        await channel.close()


async def read_out(stream: grpc.aio.StreamStreamCall) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


def told(error: grpc.aio.AioRpcError) -> MeshError:
    return status.from_call(error.code(), error.details(), tuple(error.trailing_metadata() or ()))


async def test_a_second_signal_ends_a_control_plane_at_once(mesh: Mesh) -> None:
    async with mesh.consul(), mesh.control() as control:
        await eventually(lambda: control_planes(mesh), within_seconds=20)
        control.send_signal(signal.SIGTERM)
        await eventually(lambda: '"draining"' in (mesh.folder / "control.log").read_text())

        control.send_signal(signal.SIGTERM)

        assert await asyncio.wait_for(control.wait(), 5) == 1


async def test_clients_keep_what_they_know_while_their_control_plane_is_replaced(mesh: Mesh) -> None:
    async with (
        mesh.consul(),
        mesh.envoy(),
        mesh.instance("auth-1", "auth"),
        mesh.instance("task-1"),
        mesh.client() as heard,
    ):
        async with mesh.control():
            await eventually(lambda: only(heard, "task-1"), within_seconds=30)
            await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)
            heard.clear()
        edges = [await mesh.edge_answers() for _ in range(20)]
        async with mesh.control(), mesh.instance("task-2"):
            await eventually(lambda: only(heard, "task-1", "task-2"), within_seconds=30)
            await eventually(lambda: edge_only(mesh, "task-1", "task-2"), within_seconds=20)

            assert set(heard) == {"task-1", "task-2"}
            assert set(edges) == {"task-1"}
