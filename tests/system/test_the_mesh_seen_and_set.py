"""What an administrator sees of the running mesh, and the settings that change while it runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from envoy.service.status.v3 import csds_pb2, csds_pb2_grpc
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from mesh.control.snapshot import LISTENER, called
from scripts.local.layout import SERVICES, WORKERS, Layout
from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person


@pytest.fixture
async def chief(mesh: Mesh, person: Person) -> Person:
    granted = await person.http.post(
        f"{mesh.url}/api/v1/users:grantAdmin", json={"login": person.username, "secret": mesh.secret("admin")}
    )
    assert granted.status_code == 200
    await person.sign_in()
    return person


@pytest.fixture
async def keys(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    """Consul's KV."""
    url = Layout.from_environment(mesh.environment).consul_url
    token = {"x-consul-token": mesh.secret("consul.operator")}
    async with httpx.AsyncClient(base_url=f"{url}/v1/kv/", headers=token) as client:
        yield client


async def instances(chief: Person, service: str) -> list[dict]:
    (found,) = (await chief.http.get("mesh/topology", params={"service": service})).json()["services"]
    return found["instances"]


async def test_settings_change_in_every_replica_and_a_bad_change_in_none(
    mesh: Mesh, chief: Person, keys: httpx.AsyncClient
) -> None:
    async def in_force(**expected: object) -> bool:
        found = [json.loads(each["settings"]) for each in await instances(chief, "task")]
        return len(found) == 2 and all(expected.items() <= settings.items() for settings in found)

    await eventually(lambda: in_force(attempts=3, log_level="INFO"), within_seconds=30)

    await keys.put("config/task", json={"attempts": 4, "log_level": "DEBUG"})
    await eventually(lambda: in_force(attempts=4, log_level="DEBUG"), within_seconds=10)
    await eventually(lambda: '"level": "DEBUG"' in Path(mesh.var / "log" / "task-1.log").read_text())

    await keys.put("config/task", json={"attempts": 0})

    async def refused() -> bool:
        return all("attempts" in each["settingsRefusal"] for each in await instances(chief, "task"))

    await eventually(refused, within_seconds=10)
    assert await in_force(attempts=4)
    assert {each["health"] for each in await instances(chief, "task")} == {"HEALTH_PASSING"}

    await keys.delete("config/task")
    await eventually(lambda: in_force(attempts=3, log_level="INFO"), within_seconds=10)


async def test_every_process_of_ours_is_seen_and_those_that_call_others_follow_the_newest(
    mesh: Mesh, chief: Person
) -> None:
    async def whole() -> bool:
        found = (await chief.http.get("mesh/topology")).json()
        seen = {each["instanceId"] for service in found["services"] for each in service["instances"]}
        ours = ("control", *SERVICES, *WORKERS)
        names = {f"{name}-{number}" for name in ours for number in (1, 2)}
        followers = {client["nodeId"] for client in found["clients"]}
        newest = all(
            subscription["acknowledgedVersion"] == subscription["sentVersion"]
            for client in found["clients"]
            for subscription in client["subscriptions"]
        )
        return names <= seen and {"edge-1", "user-1", "task-2"} <= followers and newest

    await eventually(whole, within_seconds=30)


async def test_grpc_itself_tells_of_its_channels_and_of_what_it_was_told(chief: Person) -> None:
    address = (await eventually(lambda: instances(chief, "task"), within_seconds=10))[0]["adminAddress"]

    async with grpc.aio.insecure_channel(address) as channel:
        channels = await channelz_pb2_grpc.ChannelzStub(channel).GetTopChannels(
            channelz_pb2.GetTopChannelsRequest(), timeout=5
        )
        told = await csds_pb2_grpc.ClientStatusDiscoveryServiceStub(channel).FetchClientStatus(
            csds_pb2.ClientStatusRequest(), timeout=5
        )

    assert "xds:///auth" in {each.data.target for each in channels.channel}
    assert ("Listener", called(LISTENER, "auth")) in {
        (each.type_url.rpartition(".")[2], each.name) for config in told.config for each in config.generic_xds_configs
    }
