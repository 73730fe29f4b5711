"""The audit sees what it is there for: five faults, planted one after another into a copy of the code that runs.

Each is provoked in the way in which it would show in life; the same provocation of the sound code leaves nothing.
A lost permit is not among them: the task service replaces it, so acknowledging early only harms what is sent once.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.local.layout import Layout, mesh_environment
from scripts.local.programs import Supervisor
from tests.chaos.audit import audited
from tests.chaos.storm import at_rest
from tests.checkout import copied
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.people import Person, registered
from tests.photographs import photograph

pytestmark = pytest.mark.timeout(300)  # the first one waits for the copy and its mesh


@dataclass(frozen=True)
class Fault:
    """One text of one file that becomes another, in the service named; what the audit says then."""

    path: str
    sound: str
    faulty: str
    service: str
    provoked: Callable[[Mesh, Person], Awaitable[None]]
    said: str


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    root = copied(tmp_path_factory.mktemp("planted") / "atelier")
    with running(root / "var", root=root) as mesh:
        yield mesh


@pytest.fixture
async def person(copy: Mesh) -> AsyncIterator[Person]:
    nobody = {"login": "nobody", "password": "wrong"}
    async with httpx.AsyncClient(base_url=f"{copy.url}/api/v1/") as http:

        async def known_to_the_edge() -> bool:
            """Tell whether the edge has heard that the user service, killed by the test before, is back."""
            return (await http.post("users/login", json=nobody)).status_code == httpx.codes.UNAUTHORIZED

        await eventually(known_to_the_edge, within_seconds=30)
    async with registered(copy.url) as someone:
        yield someone


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """What the audit has said already: nobody repairs what a planted fault has done."""
    return set()


async def cancelled_in_the_queue(mesh: Mesh, person: Person) -> None:
    """A task is cancelled before any worker takes it."""
    async with waiting_task(mesh, person) as task_id:
        await cancel(person, task_id)


async def killed_with_a_message_to_send(mesh: Mesh, person: Person) -> None:
    """The task service dies while the broker is away."""
    # Not only halted: what is sent to a halted one waits in the kernel and arrives all the same.
    async with waiting_task(mesh, person) as task_id, ended(mesh, "rabbitmq"):
        before = logged(mesh, "task-1")
        await cancel(person, task_id)
        # Twice: what could not be sent from memory is then claimed from the database.
        await eventually(lambda: logged(mesh, "task-1")[len(before) :].count("outbox waits") >= 2, within_seconds=30)
        await killed(mesh, "task")


async def killed_with_a_message_in_hand(mesh: Mesh, person: Person) -> None:
    """The user service dies while it waits for its database with an event that it has received."""
    async with waiting_task(mesh, person) as task_id:
        with closing(sqlite3.connect(mesh.var / "data" / "user.db", isolation_level=None)) as another:
            another.execute("BEGIN IMMEDIATE")
            before = logged(mesh, "user-1")
            await cancel(person, task_id)
            await eventually(lambda: "message waits" in logged(mesh, "user-1")[len(before) :], within_seconds=30)
            await killed(mesh, "user")


async def done_by_two(mesh: Mesh, person: Person) -> None:
    """A worker whose attempt is over says that it has done the task, with another file."""
    async with waiting_task(mesh, person) as task_id:
        pass
    await done(person, task_id)
    other = await uploaded(person)
    told = mesh_environment(Layout.from_environment(mesh.environment), {}, mesh.secret("broker"))
    said = subprocess.run(
        [mesh.root / ".venv" / "bin" / "python", "-c", COMPLETE, task_id, other],
        env={"PATH": "", **told, "ATELIER_INSTANCE": "media-worker-1"},
        capture_output=True, text=True, timeout=60, check=False, cwd=mesh.root,
    )  # fmt: skip
    assert said.stdout.strip() in {"LEASE_LOST", "accepted"}, said.stdout + said.stderr


COMPLETE = """
import asyncio, sys
from atelier.task.v1 import task_pb2, task_pb2_grpc
from mesh import channel, errors
from mesh.certificates import Leaf
from services.media.config import WorkerConfig

async def main():
    config = WorkerConfig()
    leaf = Leaf.of(config.data_dir / "identity" / config.instance)
    task_id, file_id = sys.argv[1:]
    request = task_pb2.CompleteTaskRequest(task_id=task_id, attempt=1, output_file_ids=[file_id])
    async with channel.opened("task", config, leaf) as task:
        try:
            await task_pb2_grpc.TaskServiceStub(task).CompleteTask(request)
            print("accepted")
        except errors.MeshError as error:
            print(error.reason)

asyncio.run(main())
"""


async def deleted_one_of_two(mesh: Mesh, person: Person) -> None:
    """One of two files with the same content is deleted."""
    first, _ = await uploaded(person), await uploaded(person)
    await answered(person, "DELETE", f"files/{first}")


FAULTS = {
    "published without outbox": Fault(
        "mesh/outbox.py",
        "update(rows).where(claimed).values(claimed_until=clock(self._lease), holder=holder)",
        "delete(rows).where(claimed)",
        "task",
        killed_with_a_message_to_send,
        "is CANCELLED, its reservation 1 is bound, not released",
    ),
    "acknowledged before it was handled": Fault(
        "mesh/broker.py",
        "        tries = 0\n        while True:",
        "        tries = 0\n        await last.ack(multiple=True)\n        while True:",
        "user",
        killed_with_a_message_in_hand,
        "is CANCELLED, its reservation 1 is bound, not released",
    ),
    "completed without fence": Fault(
        "services/task/domain.py",
        "    _require_held(task, attempt)\n    done = ",
        "    done = ",
        "task",
        done_by_two,
        "went from SUCCEEDED to SUCCEEDED",
    ),
    "refund skipped": Fault(
        "services/task/domain.py",
        "notices=(TaskCancelled(unwanted),)",
        "notices=()",
        "task",
        cancelled_in_the_queue,
        "is CANCELLED, its reservation 1 is bound, not released",
    ),
    "blob deleted early": Fault(
        "services/storage/keeping.py",
        "            if unused:",
        "            if True:",
        "storage",
        deleted_one_of_two,
        "has no bytes",
    ),
}


async def test_what_provokes_the_faults_leaves_nothing_of_sound_code(copy: Mesh, person: Person) -> None:
    for fault in FAULTS.values():
        await fault.provoked(copy, person)

    assert await found(copy) == set()


@pytest.mark.parametrize("name", FAULTS)
async def test_the_audit_sees_what_was(copy: Mesh, seen: set[str], person: Person, name: str) -> None:
    fault = FAULTS[name]
    with planted(copy.root, fault):
        await killed(copy, fault.service)
        await fault.provoked(copy, person)
        news = await found(copy) - seen
    seen |= news
    await killed(copy, fault.service)  # the next one is sound again

    assert [line for line in news if line.endswith(fault.said)], news


@contextmanager
def planted(root: Path, fault: Fault) -> Iterator[None]:
    path = root / fault.path
    sound = path.read_text()
    assert sound.count(fault.sound) == 1, f"{fault.path} no longer has the text that this fault changes"
    path.write_text(sound.replace(fault.sound, fault.faulty))
    try:
        yield
    finally:
        path.write_text(sound)


async def found(mesh: Mesh) -> set[str]:
    return set(audited(await at_rest(mesh), journal=[]).wrong)


@asynccontextmanager
async def waiting_task(mesh: Mesh, person: Person) -> AsyncIterator[str]:
    """Hold a task that is queued and reserved for, and that no worker takes meanwhile."""
    with stopped(mesh, "media-worker"):
        wanted = {"inputFileId": await uploaded(person), "operation": {"resize": {"width": 64}}}
        task_id = (await answered(person, "POST", "tasks", json=wanted))["taskId"]
        bound = f"SELECT 1 FROM reservation WHERE reservation_id = '{task_id}/1' AND state = 'bound'"
        await eventually(lambda: rows(mesh, "user", bound), within_seconds=30)
        yield task_id


async def uploaded(person: Person) -> str:
    content = photograph().read_bytes()
    file = await answered(person, "POST", "files?name=a.jpg", content=content, headers={"content-type": "image/jpeg"})
    return str(file["fileId"])


async def answered(person: Person, method: str, path: str, **request: Any) -> dict[str, Any]:
    """Return the answer to a request, made again while who answers it has just been killed."""

    async def answer() -> httpx.Response | None:
        response = await person.http.request(method, path, **request)
        return None if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else response

    response: httpx.Response = await eventually(answer, within_seconds=30)
    assert response.is_success, response.text
    return response.json() or {}


async def done(person: Person, task_id: str) -> None:
    async def over() -> bool:
        return (await answered(person, "GET", f"tasks/{task_id}"))["state"] == "STATE_SUCCEEDED"

    await eventually(over, within_seconds=60)


async def cancel(person: Person, task_id: str) -> None:
    task = await answered(person, "POST", f"tasks/{task_id}:cancel", json={})
    assert task["state"] == "STATE_CANCELLED", task


@contextmanager
def stopped(mesh: Mesh, service: str) -> Iterator[None]:
    """Hold a service's only instance where it is."""
    [pid] = [pid for name, pid in pids(mesh).items() if service in {name, name.rpartition("-")[0]}]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def ended(mesh: Mesh, name: str) -> AsyncIterator[None]:
    """Hold a program stopped; return when it is well again."""
    supervisor = Supervisor(Layout.from_environment(mesh.environment))
    supervisor.stop([name])
    try:
        yield
    finally:
        supervisor.start([name])
        await eventually(lambda: healthy(mesh, name), within_seconds=60)


async def killed(mesh: Mesh, service: str) -> None:
    """End a service's only instance by kill -9; return when the supervisor's next one is well."""
    old = pids(mesh)[f"{service}-1"]
    os.kill(old, signal.SIGKILL)
    await eventually(lambda: pids(mesh).get(f"{service}-1", old) != old, within_seconds=30)
    await eventually(lambda: healthy(mesh, f"{service}-1"), within_seconds=60)


def pids(mesh: Mesh) -> dict[str, int]:
    supervisor = Supervisor(Layout.from_environment(mesh.environment))
    return {name: state.pid for name, state in supervisor.states().items() if state.pid}


def healthy(mesh: Mesh, name: str) -> bool:
    return any(each["name"] == name and each["health"] == "passing" for each in mesh.status()["processes"])


def logged(mesh: Mesh, name: str) -> str:
    return (mesh.var / "log" / f"{name}.log").read_text()


def rows(mesh: Mesh, database: str, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(mesh.var / "data" / f"{database}.db")) as connection:
        return connection.execute(query).fetchall()
