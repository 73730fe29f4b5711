"""Balancing and faults run in Envoy and in gRPC's core: the control plane only says how. All processes are real."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.eventually import eventually
from tests.service.control.conftest import HOST, free_port
from tests.service.control.test_membership import Mesh, edge_only, mesh, only

__all__ = ["mesh"]  # the fixture


@pytest.fixture
async def around(mesh: Mesh) -> AsyncIterator[AsyncExitStack]:
    """A registry and the keys of people's tokens; what is entered ends with the test."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(mesh.consul())
        await stack.enter_async_context(mesh.instance("auth-1", "auth"))
        yield stack


async def test_an_instance_that_passes_its_check_and_fails_its_callers_gets_no_calls(
    mesh: Mesh, around: AsyncExitStack
) -> None:
    await around.enter_async_context(mesh.control())
    await around.enter_async_context(mesh.envoy())
    await around.enter_async_context(mesh.instance("task-1"))
    await around.enter_async_context(mesh.instance("task-2", ill=True))

    heard = await around.enter_async_context(mesh.client())

    await eventually(lambda: {"task-1", "INTERNAL"} <= set(heard), within_seconds=20)
    await eventually(lambda: only(heard, "task-1"), within_seconds=20)
    await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)


async def test_no_more_calls_run_at_a_time_than_the_settings_allow(mesh: Mesh, around: AsyncExitStack) -> None:
    await around.enter_async_context(mesh.control(CONTROL_MAX_REQUESTS="2"))
    await around.enter_async_context(mesh.envoy())
    task = await around.enter_async_context(mesh.instance("task-1"))
    await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)

    at_edge = await asyncio.gather(*(mesh.edge_answers("slow") for _ in range(6)))
    most_of_edge, task.most = task.most, 0
    heard = await around.enter_async_context(mesh.client(callers=6, task_id="slow"))
    await eventually(lambda: {"task-1", "UNAVAILABLE"} <= set(heard[-50:]), within_seconds=20)

    assert sorted(set(at_edge)) == ["SERVICE_UNAVAILABLE", "task-1"]
    assert (most_of_edge, task.most) == (2, 2)


async def test_ones_own_zone_is_preferred_and_the_others_are_there_when_it_fails(
    mesh: Mesh, around: AsyncExitStack
) -> None:
    await around.enter_async_context(mesh.control())
    await around.enter_async_context(mesh.envoy(zone="b"))
    await around.enter_async_context(mesh.instance("task-2", zone="b"))
    async with mesh.instance("task-1", zone="a"):
        in_a = await around.enter_async_context(mesh.client(zone="a"))
        nowhere = await around.enter_async_context(mesh.client())
        await eventually(lambda: only(in_a, "task-1"), within_seconds=20)
        await eventually(lambda: only(nowhere, "task-1", "task-2"), within_seconds=10)
        await eventually(lambda: edge_only(mesh, "task-2"), within_seconds=20)
        in_a.clear()

    await eventually(lambda: only(in_a, "task-2"), within_seconds=10)
    assert set(in_a) <= {"task-1", "task-2"}  # no call failed while its own zone went


async def test_faults_come_and_go_with_their_key_in_consul(mesh: Mesh, around: AsyncExitStack) -> None:
    await around.enter_async_context(mesh.control())
    await around.enter_async_context(mesh.envoy())
    await around.enter_async_context(mesh.instance("task-1"))
    heard = await around.enter_async_context(mesh.client())
    await eventually(lambda: only(heard, "task-1"), within_seconds=20)
    await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)

    await mesh.put("faults/task", {"abort_code": "RESOURCE_EXHAUSTED", "abort_fraction": 1})
    await eventually(lambda: only(heard, "RESOURCE_EXHAUSTED"), within_seconds=5)
    await eventually(lambda: edge_only(mesh, "FAULT_INJECTED"), within_seconds=5)

    await mesh.put("faults/task", {"abort_code": "OUT_OF_CHEESE", "abort_fraction": 1})
    await eventually(lambda: "refused" in (mesh.folder / "control.log").read_text())
    assert await mesh.edge_answers() == "FAULT_INJECTED"

    await mesh.put("faults/task", {"delay_seconds": 0.5, "delay_fraction": 1})
    await eventually(lambda: only(heard, "task-1"), within_seconds=20)
    began = time.monotonic()
    assert await mesh.edge_answers() == "task-1"
    assert time.monotonic() - began > 0.5

    await mesh.put("faults/task", None)

    async def fast() -> bool:
        began = time.monotonic()
        return await mesh.edge_answers() == "task-1" and time.monotonic() - began < 0.4

    await eventually(fast, within_seconds=5)
    assert len(heard) > 20


async def test_an_administrator_sees_the_mesh_whichever_control_plane_he_asks(
    mesh: Mesh, around: AsyncExitStack
) -> None:
    other_port = free_port()
    await around.enter_async_context(mesh.control())
    await around.enter_async_context(mesh.control(ATELIER_INSTANCE="control-2", CONTROL_ADDRESS=f"{HOST}:{other_port}"))
    await around.enter_async_context(mesh.envoy())
    await around.enter_async_context(mesh.instance("task-1", zone="a"))
    await around.enter_async_context(mesh.client(zone="a"))
    await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=20)

    async def seen(role: str = "ROLE_ADMIN", **query: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{mesh.edge_port}") as client:
            return await client.get("/api/v1/mesh/topology", params=query, headers=mesh.keys.bearer(role=role))

    async def whole() -> bool:
        answers = [(await seen(service="task")).json() for _ in range(4)]  # the edge asks both in turn
        return all(
            answer["controlPlanes"] == ["control-1", "control-2"]
            and {client["nodeId"] for client in answer["clients"]} == {"user-1", "edge-1", "control-1", "control-2"}
            and all(
                resource["acknowledgedVersion"] == resource["presentVersion"] != ""
                for client in answer["clients"]
                for subscription in client["subscriptions"]
                for resource in subscription["resources"]
            )
            for answer in answers
        )

    await eventually(whole, within_seconds=20)
    (service,) = (await seen(service="task")).json()["services"]
    (instance,) = service["instances"]
    assert (instance["instanceId"], instance["zone"], instance["health"]) == ("task-1", "a", "HEALTH_PASSING")
    assert instance["process"] == str(os.getpid())
    assert instance["sinceTime"]
    assert (await seen(role="ROLE_USER")).status_code == 403
    permissions = {(each["caller"], each["callee"]) for each in (await seen()).json()["permissions"]}
    assert ("task", "user") in permissions
    assert ("user", "media") not in permissions
