"""What scripts/up, down and status promise, on an installation of their own."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from scripts.local.layout import MARKER
from tests.eventually import eventually
from tests.installation import Mesh, running


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with running(tmp_path_factory.mktemp("alone") / "var") as started:
        yield started


def ours(mesh: Mesh) -> set[int]:
    """Return the process ids of everything that was started for an installation."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == str(mesh.var):
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def running_pids(mesh: Mesh) -> dict[str, int]:
    return {process["name"]: process["pid"] for process in mesh.status()["processes"]}


def test_up_again_changes_nothing_and_takes_no_time(alone: Mesh) -> None:
    before = running_pids(alone)

    began = time.monotonic()
    up = alone.script("up")

    assert up.returncode == 0, up.stdout + up.stderr
    assert running_pids(alone) == before
    assert time.monotonic() - began < 15  # a second or less on an idle machine


def test_everything_listens_on_loopback_only(alone: Mesh) -> None:
    addresses = {
        connection.laddr.ip
        for pid in ours(alone)
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses


def test_secrets_and_databases_are_their_owners_alone(alone: Mesh) -> None:
    private = [*(alone.var / "secrets").iterdir(), *(alone.var / "data").glob("*.db")]

    assert len(private) > 5
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in private if path.stat().st_mode & 0o077} == {}


async def test_a_killed_process_comes_back(alone: Mesh) -> None:
    before = running_pids(alone)
    for name in ("user-1", "envoy"):
        os.kill(before[name], signal.SIGKILL)

    async def back() -> bool:
        now = running_pids(alone)
        return all(now[name] not in (0, before[name]) for name in ("user-1", "envoy"))

    await eventually(back, within_seconds=30)
    await eventually(lambda: httpx.get(f"{alone.url}/readyz").status_code == 200, within_seconds=30)


def test_a_killed_supervisor_leaves_nothing_that_blocks_the_next_up(alone: Mesh) -> None:
    (supervisor,) = [pid for pid in ours(alone) if "supervisord" in " ".join(psutil.Process(pid).cmdline())]
    os.kill(supervisor, signal.SIGKILL)

    up = alone.script("up")

    assert up.returncode == 0, up.stdout + up.stderr
    assert httpx.get(f"{alone.url}/readyz").status_code == 200


def test_down_stops_what_up_started_and_keeps_the_data(alone: Mesh) -> None:
    account = {"username": "keeper", "email": "keeper@example.com", "password": "correct horse battery"}
    assert httpx.post(f"{alone.url}/api/v1/users/register", json=account).status_code == 200

    down = alone.script("down")

    assert down.returncode == 0, down.stdout + down.stderr
    assert ours(alone) == set()
    up = alone.script("up")
    assert up.returncode == 0, up.stdout + up.stderr
    login = {"login": "keeper", "password": account["password"]}
    assert httpx.post(f"{alone.url}/api/v1/users/login", json=login).status_code == 200


def test_a_taken_port_is_told_with_its_holder(alone: Mesh) -> None:
    alone.script("down")
    port = int(alone.environment["ATELIER_EDGE_PORT"])
    with socket.create_server(("127.0.0.1", port)):
        up = alone.script("up")

    assert up.returncode == 1
    told = up.stdout + up.stderr
    assert str(port) in told
    assert str(os.getpid()) in told
    assert "ATELIER_EDGE_PORT" in told
    assert ours(alone) == set()
