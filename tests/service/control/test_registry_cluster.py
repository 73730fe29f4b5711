"""Three servers of Consul, of which the leader is killed: control plane, registrations and certificates go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from mesh import certificates
from tests.eventually import eventually
from tests.ports import free_ports
from tests.service.control.conftest import HOST
from tests.service.control.test_membership import Mesh, edge_only, only

NAMES = ("consul-1", "consul-2", "consul-3")


@pytest.fixture
async def leader(tmp_path: Path) -> AsyncIterator[tuple[Mesh, asyncio.subprocess.Process]]:
    """A mesh whose local agent is a follower, and the process of the leader."""
    mesh = Mesh(tmp_path)
    taken = iter(free_ports(9))
    ports = {name: {kind: next(taken) for kind in ("http", "server", "serf_lan")} for name in NAMES}
    together = {
        "bootstrap_expect": len(NAMES),
        "retry_join": [f"{HOST}:{each['serf_lan']}" for each in ports.values()],
        "retry_interval": "1s",
    }
    async with AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(mesh.agent(name, ports[name], node_name=name, **together))
            for name in NAMES
        }

        async def elected() -> str:
            """Return the leader's name, once all know it."""
            async with httpx.AsyncClient() as client:
                told = {
                    (await client.get(f"http://{HOST}:{each['http']}/v1/status/leader")).json()
                    for each in ports.values()
                }
            return next((name for name in NAMES if told == {f"{HOST}:{ports[name]['server']}"}), "")

        first = await eventually(elected, within_seconds=30)
        follower = next(name for name in NAMES if name != first)
        mesh.environment["ATELIER_CONSUL_URL"] = f"http://{HOST}:{ports[follower]['http']}"
        await stack.enter_async_context(mesh.registrar())
        yield mesh, servers[first]


async def test_a_change_after_the_leader_was_killed_is_seen_and_no_call_fails(
    leader: tuple[Mesh, asyncio.subprocess.Process],
) -> None:
    mesh, process = leader
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(mesh.instance("auth-1", "auth"))
        await stack.enter_async_context(mesh.instance("task-1"))
        await stack.enter_async_context(mesh.control())
        await eventually((mesh.folder / "control-1.json").exists, within_seconds=30)
        await stack.enter_async_context(mesh.envoy())
        heard = await stack.enter_async_context(mesh.client())
        await eventually(lambda: only(heard, "task-1"), within_seconds=30)
        await eventually(lambda: edge_only(mesh, "task-1"), within_seconds=30)
        heard.clear()

        process.kill()
        await process.wait()

        edges = [await mesh.edge_answers() for _ in range(20)]
        await stack.enter_async_context(mesh.instance("task-2"))
        newcomer = mesh.config("user")
        newcomer.instance = "user-2"
        async with asyncio.timeout(30), certificates.kept(newcomer) as leaf:
            assert leaf.service == "user"
        await eventually(lambda: only(heard, "task-1", "task-2"), within_seconds=30)
        await eventually(lambda: edge_only(mesh, "task-1", "task-2"), within_seconds=30)
        seen = set(heard)  # before task-2 goes, with its calls under way

    assert set(edges) == {"task-1"}
    assert seen == {"task-1", "task-2"}
