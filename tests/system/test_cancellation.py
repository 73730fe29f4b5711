"""A person who goes away while the last service of a chain waits for its database. The lock is a real one."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
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
