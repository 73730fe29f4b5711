"""Envoy under what runs it: replaced without a gap, ended in order, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from scripts.local.edge import DRAIN_SECONDS
from tests.eventually import eventually
from tests.ports import free_port
from tests.service.control.conftest import ENVOY, HOST

ROOT = Path(__file__).resolve().parents[3]
PARENT_SECONDS = 3
_HTTP = "type.googleapis.com/envoy.extensions.filters"


class Edge:
    """A running edge whose answers come from its own configuration, and one path from a server of the test's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "envoy.json"
        self.log = folder / "log"
        self.port, self.admin_port, self.upstream_port = free_port(), free_port(), free_port()
        self.process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def configure(self, answer: str, **broken: object) -> None:
        """Have the next Envoy answer so."""
        routes = [
            {"match": {"path": "/slow"}, "route": {"cluster": "slow", "timeout": "0s"}},
            {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": answer}}},
        ]
        manager = {
            "@type": f"{_HTTP}.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "edge",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
            "http_filters": [
                {"name": "router", "typed_config": {"@type": f"{_HTTP}.http.router.v3.Router"}},
            ],
        }
        chain = {"filters": [{"name": "http", "typed_config": manager}]}
        endpoint = {"endpoint": {"address": _address(self.upstream_port)}}
        slow = {"cluster_name": "slow", "endpoints": [{"lb_endpoints": [endpoint]}]}
        bootstrap = {
            "node": {"id": "edge-1", "cluster": "edge"},
            "admin": {"address": _address(self.admin_port)},
            "static_resources": {
                "listeners": [{"name": "edge", "address": _address(self.port), "filter_chains": [chain]}],
                "clusters": [{"name": "slow", "type": "STATIC", "load_assignment": slow}],
            },
            **broken,
        }
        self.path.write_text(json.dumps(bootstrap))

    async def answers(self, expected: str) -> bool:
        async with httpx.AsyncClient() as fresh:
            return (await fresh.get(self.url)).text == expected

    def envoys(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def replace(self) -> None:
        self.process.send_signal(signal.SIGHUP)


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": HOST, "port_value": port}}


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    made = Edge(tmp_path)
    made.configure("first")
    command = [
        sys.executable, "-m", "scripts.local.edge", str(made.admin_port),
        ENVOY, "--config-path", str(made.path), "--concurrency", "2", "--log-level", "warning",
        "--base-id", str(made.port), "--socket-path", str(tmp_path / "envoy"), "--socket-mode", "600",
        "--drain-strategy", "immediate", "--drain-time-s", "1", "--parent-shutdown-time-s", str(PARENT_SECONDS),
    ]  # fmt: skip
    with made.log.open("w") as log:
        made.process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=log, stderr=log)
    try:
        await eventually(lambda: made.answers("first"), within_seconds=20)
        yield made
    finally:
        if made.process.returncode is None:
            made.process.kill()
            await made.process.wait()


@asynccontextmanager
async def slow_request(edge: Edge) -> AsyncIterator[tuple[asyncio.Task[httpx.Response], asyncio.Event]]:
    """Hold a request under way and what lets it end."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        begun.set()
        await go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone")
        writer.close()

    async with (
        await asyncio.start_server(answer, HOST, edge.upstream_port),
        httpx.AsyncClient(timeout=30) as client,
    ):
        call = asyncio.create_task(client.get(f"{edge.url}/slow"))
        await asyncio.wait_for(begun.wait(), 10)
        yield call, go_on
        go_on.set()
        await asyncio.wait([call])


async def test_a_hangup_replaces_envoy_and_no_request_fails_on_old_or_new_connections(edge: Edge) -> None:
    answered: list[str] = []
    stop = asyncio.Event()

    async def ask(*, fresh: bool) -> None:
        async with httpx.AsyncClient(base_url=edge.url) as kept:
            while not stop.is_set():
                if fresh:
                    async with httpx.AsyncClient(base_url=edge.url) as client:
                        answered.append((await client.get("/")).text)
                else:
                    answered.append((await kept.get("/")).text)

    asking = [asyncio.create_task(ask(fresh=bool(number % 2))) for number in range(4)]
    async with slow_request(edge) as (call, go_on):
        (before,) = edge.envoys()
        edge.configure("second")

        edge.replace()

        await eventually(lambda: answered[-1:] == ["second"], within_seconds=20)
        go_on.set()
        assert (await call).text == "done"
        await eventually(lambda: len(edge.envoys()) == 1 and before not in edge.envoys(), within_seconds=20)
    seen = len(answered)
    await eventually(lambda: len(answered) > seen + 20)
    stop.set()
    await asyncio.gather(*asking)
    assert set(answered) == {"first", "second"}
    assert set(answered[-10:]) == {"second"}


async def test_an_envoy_that_would_not_start_replaces_nothing(edge: Edge) -> None:
    (before,) = edge.envoys()
    edge.configure("second", nonsense=True)

    edge.replace()

    await eventually(lambda: "would not start" in edge.log.read_text(), within_seconds=20)
    assert edge.envoys() == [before]
    assert await edge.answers("first")
    edge.configure("third")
    edge.replace()
    await eventually(lambda: edge.answers("third"), within_seconds=20)


async def test_a_second_hangup_while_a_replacement_is_under_way_is_passed_over(edge: Edge) -> None:
    edge.configure("second")

    edge.replace()
    await eventually(lambda: len(edge.envoys()) == 2, within_seconds=20)
    edge.replace()

    await eventually(lambda: "is not over yet" in edge.log.read_text(), within_seconds=20)
    await eventually(lambda: edge.answers("second"), within_seconds=20)
    assert edge.process.returncode is None


async def test_a_stop_accepts_nothing_more_and_finishes_what_is_under_way(edge: Edge) -> None:
    async with slow_request(edge) as (call, go_on):
        envoys = edge.envoys()

        edge.process.send_signal(signal.SIGTERM)

        await eventually(lambda: refused(edge), within_seconds=DRAIN_SECONDS)
        assert edge.process.returncode is None
        go_on.set()
        assert (await call).text == "done"
        assert await asyncio.wait_for(edge.process.wait(), 10) == 0
        assert not any(psutil.pid_exists(pid) for pid in envoys)


async def refused(edge: Edge) -> bool:
    try:
        await edge.answers("")
    except httpx.ConnectError:
        return True
    return False


async def test_a_second_signal_ends_the_edge_at_once(edge: Edge) -> None:
    async with slow_request(edge) as (call, _):
        edge.process.send_signal(signal.SIGTERM)
        await eventually(lambda: refused(edge), within_seconds=DRAIN_SECONDS)

        edge.process.send_signal(signal.SIGTERM)

        assert await asyncio.wait_for(edge.process.wait(), DRAIN_SECONDS) == 0
        with pytest.raises(httpx.HTTPError):
            await call


@pytest.mark.parametrize("killed", ["envoy", "what runs it"])
async def test_a_killed_edge_leaves_no_envoy_behind(edge: Edge, killed: str) -> None:
    (envoy,) = edge.envoys()

    os.kill(envoy if killed == "envoy" else edge.process.pid, signal.SIGKILL)

    assert await asyncio.wait_for(edge.process.wait(), 10) != 0
    await eventually(lambda: not psutil.pid_exists(envoy), within_seconds=10)
