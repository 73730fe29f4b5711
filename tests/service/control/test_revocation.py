"""Revocation from the identity feed to two edges, each an Envoy under a control plane of its own."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import httpx
from atelier.mesh.v1 import identity_pb2, identity_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mesh import discovery
from mesh.discovery import Registration
from tests.eventually import eventually
from tests.service.control.conftest import HOST, envoy_running, free_port
from tests.service.control.test_membership import Mesh

BOUND_SECONDS = 3.0  # three times the promise: machines are shared
MANY = 20_000


class Auth(identity_pb2_grpc.IdentityServiceServicer):
    """Tells what a test revokes: all at first, then what is new."""

    def __init__(self, jwks: str) -> None:
        self._jwks = jwks
        self._told: list[identity_pb2.Revocation] = []
        self._changed = asyncio.Condition()

    async def revoke(self, *sessions: str) -> None:
        for session in sessions:
            revocation = identity_pb2.Revocation(claim="sid", value=session)
            revocation.expire_time.FromSeconds(int(time.time()) + 360)
            self._told.append(revocation)
        async with self._changed:
            self._changed.notify_all()

    async def WatchIdentity(self, request, context):
        sent = 0
        yield identity_pb2.WatchIdentityResponse(jwks=self._jwks, revocations=self._told)
        sent = len(self._told)
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._told) > sent)  # noqa: B023 -- read before it changes
            yield identity_pb2.WatchIdentityResponse(jwks=self._jwks, revocations=self._told[sent:])
            sent = len(self._told)

    @asynccontextmanager
    async def registered(self, mesh: Mesh) -> AsyncIterator[None]:
        server, health, health_server = grpc.aio.server(), HealthServicer(), grpc.aio.server()
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(health, health_server)
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        leaf = mesh.authority.leaf("auth", mesh.folder / "auth-1")
        port = server.add_secure_port(f"{HOST}:0", leaf.grpc_server())
        health_port = health_server.add_insecure_port(f"{HOST}:0")
        await server.start()
        await health_server.start()
        registration = Registration("auth", "auth-1", HOST, port, f"{HOST}:{health_port}")
        async with discovery.registered(mesh.config("auth"), [registration]):
            try:
                yield
            finally:
                await server.stop(None)
                await health_server.stop(None)


async def answered(mesh: Mesh, edge_port: int, session: str) -> str:
    """Return who answered one call of a session at an edge, or the reason for which there was no answer."""
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{edge_port}") as client:
        try:
            answer = (await client.get("/api/v1/tasks/t", headers=mesh.keys.bearer(sid=session))).json()
        except httpx.TransportError as error:
            return type(error).__name__
        return answer["taskId"] if "taskId" in answer else answer["details"][0]["reason"]


async def seconds_until(mesh: Mesh, edge_ports: list[int], session: str, answer: str) -> float:
    """Wait until all edges give a session one answer; return how long that took."""
    began = time.monotonic()

    async def given() -> bool:
        return {await answered(mesh, port, session) for port in edge_ports} == {answer}

    await eventually(given, within_seconds=40)
    return time.monotonic() - began


def memory_mib(program: str) -> list[int]:
    """Return the proportional share of memory of each child process whose command line names a program."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("stat").read_text().rpartition(")")[2].split()[1] != str(os.getpid()):
                continue
            if program in folder.joinpath("cmdline").read_text():
                pss = re.search(r"Pss: +([0-9]+)", folder.joinpath("smaps_rollup").read_text())
                found.append(int(pss[1]) // 1024 if pss else 0)
        except OSError:
            continue  # it has ended meanwhile
    return found


async def test_a_revocation_reaches_two_edges_in_a_second_beside_20_000_others_and_outlives_auth_and_control(
    tmp_path: Path,
) -> None:
    mesh, other_folder, other_control = Mesh(tmp_path), tmp_path / "other", free_port()
    other_folder.mkdir()
    edges = [mesh.edge_port, free_port()]
    other = {
        "ATELIER_INSTANCE": "control-2",
        "CONTROL_ADDRESS": f"{HOST}:{other_control}",
        "ATELIER_EDGE_PORT": str(edges[1]),
    }
    authority = mesh.layout.secrets / "ads-ca.pem"
    auth = Auth(mesh.keys.jwks)
    many = [f"ses_06gvpril61rtdfnv2ren{number:06d}" for number in range(MANY)]
    async with AsyncExitStack() as stack:
        hold = stack.enter_async_context
        await hold(mesh.consul())
        await hold(mesh.control(**other))
        await hold(envoy_running(other_folder, other_control, own=mesh.edge, authority=authority))
        await hold(mesh.instance("task-1"))

        async with mesh.control() as control, mesh.envoy():
            async with auth.registered(mesh):
                await seconds_until(mesh, edges, "ses_first", "task-1")
                await auth.revoke("ses_first")
                first = await seconds_until(mesh, edges, "ses_first", "TOKEN_REVOKED")
                before = memory_mib("mesh.control"), memory_mib("envoy")
                await auth.revoke(*many)
                more = await seconds_until(mesh, edges, many[-1], "TOKEN_REVOKED")
                await auth.revoke("ses_last")
                last = await seconds_until(mesh, edges, "ses_last", "TOKEN_REVOKED")
                after = memory_mib("mesh.control"), memory_mib("envoy")
            print(f"seconds until two edges refuse: one {first:.2f}, {MANY} {more:.2f}, one beside them {last:.2f}")
            print(f"MiB of control planes and Envoys: {before}, then {after}")
            without_auth = {await answered(mesh, port, session) for port in edges for session in ("ses_last", many[0])}
            valid_without_auth = {await answered(mesh, port, "ses_valid") for port in edges}
            control.kill()
            await control.wait()

        # A control plane that knows what it kept, an Envoy that knows nothing, and no auth.
        await hold(mesh.control())
        await hold(mesh.envoy())
        await seconds_until(mesh, edges, "ses_valid", "task-1")
        reborn = {await answered(mesh, mesh.edge_port, session) for session in ("ses_first", "ses_last", many[0])}

    assert max(first, more, last) < BOUND_SECONDS
    assert (without_auth, valid_without_auth, reborn) == ({"TOKEN_REVOKED"}, {"task-1"}, {"TOKEN_REVOKED"})
