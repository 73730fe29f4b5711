"""Two replicas of a service share the calls; one dies with kill -9 under load and no read fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import httpx

from scripts.local.layout import Layout
from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_main_job import upload, watched


async def test_no_read_fails_when_a_replica_is_killed(mesh: Mesh, person: Person) -> None:
    file = await upload(person, photograph())
    created = await person.http.post(
        "tasks", json={"inputFileId": file["fileId"], "operation": {"resize": {"width": 64}}}
    )
    task_id = created.json()["taskId"]
    await watched(person.http, task_id)
    answers: list[int] = []
    stop = asyncio.Event()

    async def read() -> None:
        while not stop.is_set():
            answers.append((await person.http.get(f"tasks/{task_id}")).status_code)

    readers = [asyncio.create_task(read()) for _ in range(8)]
    await eventually(lambda: len(answers) > 200, within_seconds=20)
    name, pid = min(mesh.pids("task").items())
    os.kill(pid, signal.SIGKILL)
    killed_at = len(answers)
    await eventually(lambda: len(answers) > killed_at + 500, within_seconds=30)
    stop.set()
    await asyncio.gather(*readers)

    assert set(answers) == {200}
    await eventually(lambda: mesh.pids("task").get(name, pid) != pid, within_seconds=30)


async def test_two_replicas_share_the_calls(mesh: Mesh, person: Person) -> None:
    await eventually(lambda: len(mesh.pids("user")) == 2, within_seconds=30)
    before = served(mesh)

    for _ in range(60):
        assert (await person.http.get("users/me")).status_code == 200

    after = served(mesh)
    counts = [after[address] - before.get(address, 0) for address in after]
    assert sorted(counts)[-2:] == [30, 30] or min(sorted(counts)[-2:]) >= 20, counts


def served(mesh: Mesh) -> dict[str, int]:
    """Return how many requests Envoy has sent to each instance of the user service."""
    admin = Layout.from_environment(mesh.environment).envoy_admin_port
    clusters = httpx.get(f"http://127.0.0.1:{admin}/clusters?format=json").json()["cluster_statuses"]
    (user,) = (cluster for cluster in clusters if cluster["name"] == "user")
    return {
        json.dumps(host["address"]["socket_address"]): int(
            next((s["value"] for s in host["stats"] if s["name"] == "rq_total"), 0)
        )
        for host in user["host_statuses"]
    }


async def test_what_a_killed_worker_was_doing_is_done_again(mesh: Mesh, person: Person) -> None:
    file = await upload(person, photograph())
    tasks = [
        (
            await person.http.post(
                "tasks",
                json={"inputFileId": file["fileId"], "operation": {"resize": {"width": 4000, "fit": "FIT_FIT"}}},
            )
        ).json()["taskId"]
        for _ in range(6)
    ]
    for pid in mesh.pids("media-worker").values():
        os.kill(pid, signal.SIGKILL)

    ends = [await watched(person.http, task_id) for task_id in tasks]

    assert {end["state"] for end in ends} == {"STATE_SUCCEEDED"}


async def test_what_a_killed_worker_was_making_for_two_is_made_once_by_another(
    mesh: Mesh, person: Person, another: Person
) -> None:
    operation = {"resize": {"width": 4001, "fit": "FIT_FIT", "format": "FORMAT_AVIF"}}  # some seconds

    async def asked(someone: Person) -> str:
        file = await upload(someone, photograph())
        task = await someone.http.post("tasks", json={"inputFileId": file["fileId"], "operation": operation})
        return str(task.json()["taskId"])

    async def being_made(task_id: str) -> bool:
        return (await person.http.get(f"tasks/{task_id}")).json()["progress"]["stage"] in ("decode", "process")

    first = await asked(person)
    await eventually(lambda: being_made(first), within_seconds=20)
    maker = mesh.pid(claims(mesh, first)[0])
    os.kill(maker, signal.SIGSTOP)  # so that it neither ends this nor takes the other's
    second = await asked(another)
    await eventually(lambda: claims(mesh, second), within_seconds=20)
    os.kill(maker, signal.SIGKILL)

    async with asyncio.timeout(50):  # it does not wait the whole minute that it would for one that lives
        ends = [await watched(each.http, task_id) for each, task_id in ((another, second), (person, first))]

    assert [end["state"] for end in ends] == ["STATE_SUCCEEDED"] * 2, ends
    assert (len(claims(mesh, first)), len(claims(mesh, second))) == (2, 1)
    contents = [
        (await each.http.get(f"files/{end['outputFileIds'][0]}/content")).content
        for each, end in zip((another, person), ends, strict=True)
    ]
    assert contents[0] == contents[1]
    taken = [each["task_id"] for each in said(mesh, "media-worker", "made before")]
    assert [task_id for task_id in taken if task_id in (first, second)] == [first]


def claims(mesh: Mesh, task_id: str) -> list[str]:
    """Return which workers took a task, in order."""
    return [each["worker_id"] for each in said(mesh, "task", "claimed") if each["task_id"] == task_id]


def said(mesh: Mesh, service: str, message: str) -> list[dict[str, Any]]:
    """Return the entries with this message in the logs of a service."""
    lines = [line for path in (mesh.var / "log").glob(f"{service}-?.log") for line in path.read_text().splitlines()]
    return [entry for line in lines if message in line and (entry := json.loads(line))["message"] == message]
