"""What the whole mesh does while its registry or its control planes are away, and when an instance is ill or killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from scripts.local.layout import ROOT, Layout, mesh_environment
from scripts.local.programs import Supervisor
from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_identity import registry, supervised
from tests.system.test_main_job import upload, watched

CONVERT = {"convert": {"format": "FORMAT_PNG"}}
OUTAGE_SECONDS = 10.0


@pytest.fixture
def layout(mesh: Mesh) -> Layout:
    return Layout.from_environment(mesh.environment)


@asynccontextmanager
async def load(person: Person) -> AsyncIterator[list[str]]:
    """Read and work without end, at the edge and between services; yields what each call came to."""
    file = await upload(person, photograph())
    answers: list[str] = []

    async def read() -> None:
        for path in ("users/me", f"files/{file['fileId']}", f"files/{file['fileId']}/content"):
            answer = await person.http.get(path)
            answers.append(f"{path} {answer.status_code}")

    async def work() -> None:  # task asks storage and user, the worker asks task and storage
        created = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": CONVERT})
        answers.append(f"create {created.status_code}")
        if created.status_code == 200:
            answers.append((await watched(person.http, created.json()["taskId"]))["state"])

    async def for_ever(step: Callable, pause_seconds: float) -> None:
        while True:
            await step()
            await asyncio.sleep(pause_seconds)

    steps = [asyncio.create_task(for_ever(read, 0.05)) for _ in range(2)] + [asyncio.create_task(for_ever(work, 0.5))]
    try:
        await eventually(lambda: "STATE_SUCCEEDED" in answers, within_seconds=30)
        yield answers
        after = len(answers)
        await eventually(lambda: "STATE_SUCCEEDED" in answers[after:], within_seconds=30)
    finally:
        for step in steps:
            step.cancel()
        ends = await asyncio.gather(*steps, return_exceptions=True)
    assert {type(end) for end in ends} == {asyncio.CancelledError}, ends


def failed(answers: list[str]) -> list[str]:
    return [answer for answer in answers if not answer.endswith((" 200", "STATE_SUCCEEDED"))]


def passing(layout: Layout) -> set[str]:
    """Return the instances that pass their check."""
    with registry(layout) as consul:
        checks = consul.get("agent/checks").json().values()
    return {each["ServiceID"] for each in checks if each["Status"] == "passing"}


async def test_no_call_fails_while_consul_is_away(layout: Layout, person: Person) -> None:
    before = passing(layout)
    async with load(person) as answers:
        await supervised(layout, "stop", "consul")
        await asyncio.sleep(OUTAGE_SECONDS)
        of_outage = len(answers)
        await supervised(layout, "start", "consul")
        await eventually(lambda: passing(layout) == before, within_seconds=3 * 15)

    assert of_outage > 20
    assert failed(answers) == []


async def test_no_call_fails_while_every_control_plane_is_away(layout: Layout, person: Person) -> None:
    controls = [f"control-{number}" for number in range(1, layout.replicas + 1)]
    before = passing(layout)
    async with load(person) as answers:
        await supervised(layout, "stop", *controls)
        await asyncio.sleep(OUTAGE_SECONDS)
        of_outage = len(answers)
        await supervised(layout, "start", *controls)
        await eventually(lambda: passing(layout) == before, within_seconds=3 * 15)

    assert of_outage > 20
    assert failed(answers) == []


@pytest.mark.timeout(300)  # more than all its bounds together
async def test_what_is_killed_while_consul_is_away_comes_back_and_serves(layout: Layout, person: Person) -> None:
    before = passing(layout)

    async def killed(service: str) -> None:
        """Kill every instance of a service; wait until each was started again."""
        pids = {name: pid for name, pid in running(layout).items() if name.rpartition("-")[0] == service}
        pids = pids or {service: running(layout)[service]}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        await eventually(
            lambda: not pids.items() & running(layout).items() and pids.keys() <= running(layout).keys(), 30
        )

    async def serves() -> bool:
        """Tell whether a call through the edge to task, and one from there to others, come to something."""
        file = await upload(person, photograph())
        created = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": CONVERT})
        return created.status_code == 200 and (await person.http.get(f"tasks/{created.json()['taskId']}")).is_success

    assert await serves()
    await supervised(layout, "stop", "consul")
    try:
        for service in ("control", "task", "envoy"):
            await killed(service)
            await eventually(serves, within_seconds=3 * 15)
    finally:
        await supervised(layout, "start", "consul")

    began = time.monotonic()
    await eventually(lambda: passing(layout) == before, within_seconds=3 * 15)
    print(f"all are registered after {time.monotonic() - began:.1f} s")
    assert await serves()


def running(layout: Layout) -> dict[str, int]:
    """Return the process id of each program that runs, by its name."""
    return {name: state.pid for name, state in Supervisor(layout).states().items() if state.pid}


# A third instance of user, which nobody supervises


class Third:
    """An instance beside the two of the installation; it has its database by a way of its own."""

    def __init__(self, layout: Layout, process: asyncio.subprocess.Process, way: Path) -> None:
        self._layout = layout
        self.process = process
        self.way = way

    def entry(self) -> dict:
        with registry(self._layout) as consul:
            return consul.get("agent/services").json()["user-3"]

    def passes(self) -> bool:
        return "user-3" in passing(self._layout)

    def calls(self) -> int | None:
        """Return how many calls the edge has sent to it, None while it would send none."""
        admin = f"http://127.0.0.1:{self._layout.envoy_admin_port}/clusters?format=json"
        (user,) = (each for each in httpx.get(admin).json()["cluster_statuses"] if each["name"] == "user")
        for host in user["host_statuses"]:
            if host["address"]["socket_address"]["port_value"] == self.entry()["Port"]:
                return int(next((each.get("value", 0) for each in host["stats"] if each["name"] == "rq_total"), 0))
        return None


@pytest.fixture
async def third(mesh: Mesh, layout: Layout, tmp_path: Path) -> AsyncIterator[Third]:
    way = tmp_path / "way"
    way.symlink_to(layout.data)
    told = {
        **mesh_environment(layout, {}, mesh.secret("broker")),
        "ATELIER_INSTANCE": "user-3",
        "USER_DATABASE_URL": f"sqlite+aiosqlite:///{way}/user.db",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'generated'}",
    }
    with (tmp_path / "user-3.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.user", env=told, cwd=ROOT, stdout=log, stderr=log
        )
    made = Third(layout, process, way)
    try:
        await eventually(made.passes, within_seconds=60)
        await eventually(lambda: made.calls() is not None, within_seconds=10)
        yield made
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        with registry(layout, "user") as consul:
            consul.put("agent/service/deregister/user-3")


@asynccontextmanager
async def reading(person: Person) -> AsyncIterator[list[int]]:
    """Read from user without end; yields the status of each answer."""
    answers: list[int] = []

    async def read() -> None:
        while True:
            answers.append((await person.http.get("users/me")).status_code)

    readers = [asyncio.create_task(read()) for _ in range(4)]
    try:
        yield answers
        after = len(answers)
        await eventually(lambda: len(answers) > after + 50, within_seconds=30)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def test_an_instance_whose_database_is_away_gets_no_calls_until_it_is_back(
    layout: Layout, person: Person, third: Third
) -> None:
    async with reading(person) as answers:
        await eventually(third.calls, within_seconds=20)

        third.way.unlink()

        began = time.monotonic()
        await eventually(lambda: third.calls() is None, within_seconds=3 * 2)  # of its own check and Consul's, 1 s each
        print(f"without its database it is out after {time.monotonic() - began:.1f} s")
        third.way.symlink_to(layout.data)
        await eventually(third.calls, within_seconds=3 * 2 + 10)

    assert set(answers) == {200}


async def test_a_killed_instance_is_out_of_the_balancers_and_no_read_fails(
    person: Person, third: Third
) -> None:
    async with reading(person) as answers:
        await eventually(third.calls, within_seconds=20)

        third.process.kill()

        began = time.monotonic()
        await eventually(lambda: third.calls() is None, within_seconds=3 * 10)
        print(f"killed, it is out after {time.monotonic() - began:.1f} s")

    assert set(answers) == {200}
    assert not third.passes()
