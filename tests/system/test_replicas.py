"""Two replicas of a service share the calls; one dies with kill -9 under load and no read fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal

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
