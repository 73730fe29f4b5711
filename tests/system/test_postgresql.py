"""A mesh that keeps its data in PostgreSQL: the main job, and the death of the server in the middle of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from scripts.local.layout import DATABASES, Layout
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.people import Person, registered
from tests.photographs import photograph
from tests.system.test_main_job import require_small_rocket, upload, watched

TASKS = 40


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    folder = Path(tempfile.mkdtemp(prefix="atelier-"))  # pytest's own let nobody else in
    folder.chmod(0o711)
    try:
        with running(folder / "var", "--postgres") as started:
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def person(mesh: Mesh) -> AsyncIterator[Person]:
    async with registered(mesh.url) as someone:
        yield someone


async def persistent(call: Any) -> httpx.Response:
    """Return what a call answers, made until it is neither refused for now nor broken off."""

    async def answered() -> httpx.Response | None:
        try:
            response = await call()
        except httpx.TransportError:
            return None
        return None if response.status_code in {429, 503, 504} else response

    return await eventually(answered, within_seconds=90)


def connected(mesh: Mesh, role: str, database: str) -> psycopg.Connection[Any]:
    port = Layout.from_environment(mesh.environment).postgresql_port
    password = mesh.secret(f"postgresql.{role}")
    return psycopg.connect(host="127.0.0.1", port=port, user=role, password=password, dbname=database)


async def test_the_main_job(person: Person) -> None:
    file = await upload(person, photograph())
    created = await person.http.post(
        "tasks", json={"inputFileId": file["fileId"], "operation": {"resize": {"width": 320, "format": "FORMAT_WEBP"}}}
    )

    final = await watched(person.http, created.json()["taskId"])

    assert final["state"] == "STATE_SUCCEEDED", final
    content = await person.http.get(f"files/{final['outputFileIds'][0]}/content")
    require_small_rocket(content.content)


async def test_a_server_killed_under_load_comes_back_and_no_task_is_lost(mesh: Mesh, person: Person) -> None:
    file = await upload(person, photograph())
    (server,) = [each["pid"] for each in mesh.status()["processes"] if each["name"] == "postgresql"]

    async def run(number: int) -> str:
        order = {"inputFileId": file["fileId"], "operation": {"resize": {"width": 300 + number}}}
        key = {"idempotency-key": f"order-{number}"}
        created = await persistent(lambda: person.http.post("tasks", json=order, headers=key))
        assert created.status_code == 200, created.text
        task_id = created.json()["taskId"]
        if number == TASKS // 4:
            os.kill(server, signal.SIGKILL)

        async def ended() -> dict[str, Any] | None:
            found = (await persistent(lambda: person.http.get(f"tasks/{task_id}"))).json()
            return found if found["state"] in {"STATE_SUCCEEDED", "STATE_FAILED"} else None

        task = await eventually(ended, within_seconds=90)
        assert task["state"] == "STATE_SUCCEEDED", task
        return task_id

    done = await asyncio.gather(*map(run, range(TASKS)))

    async def settled() -> bool:
        quota = (await persistent(lambda: person.http.get("users/me/quota"))).json()["tasks"]
        return (quota["used"], quota["reserved"]) == (str(TASKS), "0")

    assert len(set(done)) == TASKS
    await eventually(settled, within_seconds=60)
    await eventually(lambda: {each["health"] for each in mesh.status()["processes"]} == {"passing"}, within_seconds=30)
    assert {each["name"] for each in mesh.status()["processes"] if each["restarts"]} == {"postgresql"}


def test_a_service_s_role_enters_its_own_database_only(mesh: Mesh) -> None:
    with connected(mesh, "task", "task") as own:
        assert own.execute("SELECT count(*) FROM task").fetchone() is not None

    for other in {*DATABASES, "postgres", "template1"} - {"task"}:
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            connected(mesh, "task", other)


def test_what_is_committed_is_on_the_disk_and_checked_when_read(mesh: Mesh) -> None:
    with connected(mesh, "task", "task") as connection:
        settings = [
            connection.execute(f"SHOW {name}".encode()).fetchone()
            for name in ("fsync", "synchronous_commit", "data_checksums")
        ]

    assert settings == [("on",)] * 3
