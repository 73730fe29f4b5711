"""What is not wanted any more stops: calls whose person has gone away, and work that is cancelled."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import psutil
import pytest

from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.slow_image import slow_image
from tests.system.test_main_job import upload

AT_A_TIME = 10
SOON_SECONDS = 3.0  # a writer that went on would have its five; machines are shared


@contextmanager
def locked(mesh: Mesh, service: str) -> Iterator[None]:
    """Hold the lock of a service's database, as another process that writes does."""
    with closing(sqlite3.connect(mesh.var / "data" / f"{service}.db", isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def creating(person: Person, file_id: str) -> Coroutine[Any, Any, Any]:
    body = {"inputFileId": file_id, "operation": {"resize": {"width": 32}}}
    return person.http.post("tasks", json=body)


def uploading(person: Person, _: str) -> Coroutine[Any, Any, Any]:
    return person.http.post("files", params={"name": "a.txt"}, content=b"I am a letter.")


@pytest.mark.parametrize(("call", "metric"), [(creating, "tasks"), (uploading, "storageBytes")])
async def test_a_caller_that_goes_away_leaves_no_reservation_and_no_writer_behind(
    mesh: Mesh, person: Person, call: Callable[[Person, str], Coroutine[Any, Any, Any]], metric: str
) -> None:
    """R-07: the edge, task or storage, and user, whose statement waits."""
    file_id = (await upload(person, photograph()))["fileId"]
    before = (await person.http.get("users/me/quota")).json()[metric]

    with locked(mesh, "user"):
        calls = [asyncio.create_task(call(person, file_id)) for _ in range(AT_A_TIME)]
        await asyncio.sleep(1)  # the time in which all have come to the last hop
        for each in calls:
            each.cancel()
        await asyncio.wait(calls)
        await asyncio.sleep(1)  # the time in which the edge, and each hop, has heard of it

    began = time.monotonic()
    written = await person.http.patch("users/me", json={"displayName": "Ada"})
    assert written.status_code == 200, written.text
    assert time.monotonic() - began < SOON_SECONDS
    assert (await person.http.get("users/me/quota")).json()[metric] == before


async def test_a_cancelled_decode_is_over_in_two_seconds_and_gives_everything_back(
    mesh: Mesh, person: Person, record_property: Callable[[str, object], None]
) -> None:
    """R-23: cancelled a second into a decode of half a minute."""
    uploaded = await person.http.post("files", params={"name": "slow.avif"}, content=slow_image())
    photo = await upload(person, photograph())
    before = await tasks_of_quota(person)
    workers = {psutil.Process(pid) for pid in mesh.pids("media-worker").values()}
    used = {child: child.cpu_times().user for worker in workers for child in worker.children()}
    task = (await creating(person, uploaded.json()["fileId"])).json()

    def decoding() -> psutil.Process | None:
        """Return the child that has worked for a while: of what else the tests ask for, nothing takes so long."""
        children = [child for worker in workers for child in worker.children()]
        return next((child for child in children if child.cpu_times().user - used.get(child, 0) > 2), None)

    child = await eventually(decoding, within_seconds=30)
    cancelled = await person.http.post(f"tasks/{task['taskId']}:cancel", json={})

    assert cancelled.json()["state"] == "STATE_CANCELLED"
    answered = time.monotonic()
    await eventually(lambda: not child.is_running(), within_seconds=2)
    record_property("R-23", f"a second into 30 s of decoding: the child gone {time.monotonic() - answered:.2f} s later")
    await eventually(partial(has_quota, person, before))
    assert all(worker.is_running() for worker in workers)
    after = (await creating(person, photo["fileId"])).json()
    done = await person.http.get(f"tasks/{after['taskId']}", params={"wait": "20s"})
    assert done.json()["state"] == "STATE_SUCCEEDED"
    assert (await person.http.get(f"tasks/{task['taskId']}")).json()["state"] == "STATE_CANCELLED"


async def tasks_of_quota(person: Person) -> dict[str, str]:
    return (await person.http.get("users/me/quota")).json()["tasks"]


async def has_quota(person: Person, tasks: dict[str, str]) -> bool:
    return await tasks_of_quota(person) == tasks
