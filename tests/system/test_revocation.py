"""R-18: who is signed out, disabled or given another role is so within a second, everywhere."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import PASSWORD, Person
from tests.photographs import photograph
from tests.system.test_main_job import upload
from tests.system.test_refusals import require_refusal

BOUND_SECONDS = 3.0  # three times the promise: machines are shared


@contextmanager
def workers_stopped(mesh: Mesh) -> Iterator[None]:
    """Have no task go on, so that a watch of it stays open."""
    pids = mesh.pids("media-worker").values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def watching(person: Person) -> AsyncIterator[AsyncIterator[str]]:
    """Hold an open watch of a new task; yields its lines after the first."""
    file = await upload(person, photograph())
    asked = {"inputFileId": file["fileId"], "operation": {"resize": {"width": 64}}}
    task = (await person.http.post("tasks", json=asked)).json()
    async with person.http.stream("GET", f"tasks/{task['taskId']}:watch") as stream:
        lines = stream.aiter_lines()
        while not (await anext(lines)).startswith("data:"):
            pass
        yield lines


async def revoked(http: httpx.AsyncClient, **request: dict) -> httpx.Response:
    """Return the refusal of a call whose token was good just now."""

    async def refused() -> httpx.Response | None:
        answer = await http.get("users/me", **request)
        return answer if answer.status_code == 401 else None

    return await eventually(refused, within_seconds=BOUND_SECONDS)


async def last_event(lines: AsyncIterator[str]) -> tuple[str, dict]:
    """Return name and data of what a stream ends with."""
    *_, name, data = [line async for line in lines if line.startswith(("event:", "data:"))]
    return name.removeprefix("event:").strip(), json.loads(data.removeprefix("data:"))


@pytest.fixture
async def admin(mesh: Mesh, another: Person) -> Person:
    granted = await another.http.post(
        f"{mesh.url}/api/v1/users:grantAdmin", json={"login": another.username, "secret": mesh.secret("admin")}
    )
    assert granted.status_code == 200
    await another.sign_in()
    return another


async def test_signing_out_ends_the_access_token_and_no_other_session(person: Person) -> None:
    login = (await person.http.post("users/login", json={"login": person.username, "password": PASSWORD})).json()
    other = {"authorization": f"Bearer {login['accessToken']}"}
    assert (await person.http.get("users/me", headers=other)).status_code == 200

    await person.http.post("auth/revoke", json={"refreshToken": login["refreshToken"]})

    refusal = await revoked(person.http, headers=other)
    require_refusal(refusal, 401, "TOKEN_REVOKED")
    assert refusal.headers["www-authenticate"] == "Bearer"
    assert (await person.http.get("users/me")).status_code == 200


async def test_disabling_an_account_ends_its_tokens_and_its_open_watches(
    mesh: Mesh, person: Person, admin: Person
) -> None:
    with workers_stopped(mesh):
        async with watching(person) as lines:
            disabled = await admin.http.post(
                f"users/{person.user_id}/role:set", json={"status": "STATUS_DISABLED"}
            )  # fmt: skip
            assert disabled.status_code == 200
            require_refusal(await revoked(person.http), 401, "TOKEN_REVOKED")
            name, error = await last_event(lines)

    assert (name, error["code"], error["details"][0]["reason"]) == ("error", 16, "TOKEN_REVOKED")


async def test_a_lowered_role_ends_at_once_and_a_refresh_gives_the_present_one(person: Person, admin: Person) -> None:
    login = await admin.http.post("users/login", json={"login": admin.username, "password": PASSWORD})
    lowered = await admin.http.post(f"users/{admin.user_id}/role:set", json={"role": "ROLE_USER"})
    assert lowered.status_code == 200

    require_refusal(await revoked(admin.http), 401, "TOKEN_REVOKED")
    tokens = await admin.http.post("auth/refresh", json={"refreshToken": login.json()["refreshToken"]})
    admin.http.headers["authorization"] = f"Bearer {tokens.json()['accessToken']}"
    refusal = await admin.http.get(f"users/{person.user_id}")

    assert (await admin.http.get("users/me")).json()["role"] == "ROLE_USER"
    require_refusal(refusal, 404, "USER_NOT_FOUND")


async def test_a_new_key_leaves_an_open_watch_open(mesh: Mesh, person: Person, admin: Person) -> None:
    with workers_stopped(mesh):
        async with watching(person) as lines:
            rotated = (await admin.http.post("auth/keys:rotate", json={})).json()

            async def published() -> bool:
                jwks = (await person.http.get(f"{mesh.url}/.well-known/jwks.json")).json()
                return rotated["keyId"] in {key["kid"] for key in jwks["keys"]}

            await eventually(published, within_seconds=5)
            for pid in mesh.pids("media-worker").values():
                os.kill(pid, signal.SIGCONT)
            states = [json.loads(line.removeprefix("data:"))["state"] async for line in lines if line[:5] == "data:"]

    assert states[-1] == "STATE_SUCCEEDED"
