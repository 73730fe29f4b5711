"""The JSON that browsers get, fixed: lowerCamelCase, zero values present, enums by name, 64-bit integers as strings."""

from __future__ import annotations

import re
from typing import Any

from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_main_job import upload, watched

ID = re.compile(r"(usr|fil|tsk)_[0-9a-v]{26}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")


def settled(value: Any) -> Any:
    """Return `value` with what differs from run to run replaced by what it is."""
    if isinstance(value, dict):
        return {key: settled(each) for key, each in value.items()}
    if isinstance(value, list):
        return [settled(each) for each in value]
    if isinstance(value, str):
        return TIME.sub("<time>", ID.sub(r"<\1>", value))
    return value


async def test_a_task(person: Person) -> None:
    file = await upload(person, photograph())
    created = await person.http.post(
        "tasks", json={"inputFileId": file["fileId"], "operation": {"resize": {"width": 32}}}
    )

    queued = settled(created.json())
    succeeded = settled(await watched(person.http, created.json()["taskId"]))

    common = {
        "taskId": "<tsk>",
        "userId": "<usr>",
        "inputFileId": "<fil>",
        "operation": {"resize": {"width": 32, "fit": "FIT_UNSPECIFIED", "format": "FORMAT_UNSPECIFIED"}},
        "createTime": "<time>",
        "updateTime": "<time>",
        "batchId": "",
    }
    assert queued == {
        **common,
        "state": "STATE_QUEUED",
        "progress": {"fraction": 0, "stage": "queued"},
        "outputFileIds": [],
        "attempt": 0,
    }
    assert succeeded == {
        **common,
        "state": "STATE_SUCCEEDED",
        "progress": {"fraction": 1, "stage": "done"},
        "outputFileIds": ["<fil>"],
        "attempt": 1,
        "startTime": "<time>",
        "endTime": "<time>",
    }


async def test_a_file(person: Person) -> None:
    file = await upload(person, photograph())

    assert settled(file) == {
        "fileId": "<fil>",
        "name": "rocket.jpg",
        "contentType": "image/jpeg",
        "sizeBytes": "112525",
        "sha256": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "createTime": "<time>",
        "taskId": "",
    }
    assert (await person.http.get(f"files/{file['fileId']}")).json() == file


async def test_an_account(person: Person) -> None:
    account = (await person.http.get("users/me")).json()

    assert settled(account) == {
        "userId": "<usr>",
        "username": person.username,
        "email": f"{person.username}@example.com",
        "displayName": "",
        "role": "ROLE_USER",
        "status": "STATUS_ACTIVE",
        "quota": {
            "tasks": {"limit": "100", "used": "0", "reserved": "0"},
            "storageBytes": {"limit": "1073741824", "used": "0", "reserved": "0"},
            "resetTime": "<time>",
        },
        "createTime": "<time>",
        "etag": account["etag"],
    }


async def test_a_refusal_of_a_service_and_of_the_edge(mesh: Mesh, person: Person) -> None:
    by_service = (await person.http.get("tasks/tsk_nothing")).json()
    by_edge = (await person.http.get(f"{mesh.url}/nothing")).json()

    for refusal, reason in ((by_service, "TASK_NOT_FOUND"), (by_edge, "ROUTE_NOT_FOUND")):
        (info,) = refusal["details"]
        assert set(refusal) == {"code", "message", "details"}
        assert refusal["code"] == 5
        assert info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
        assert (info["reason"], info["domain"]) == (reason, "atelier")
        assert isinstance(info["metadata"], dict)


async def test_keys_rotate_and_tokens_of_the_old_key_stay_good(mesh: Mesh, person: Person) -> None:
    granted = await person.http.post(
        f"{mesh.url}/api/v1/users:grantAdmin", json={"login": person.username, "secret": mesh.secret("admin")}
    )
    assert granted.status_code == 200
    await person.sign_in()
    jwks = f"{mesh.url}/.well-known/jwks.json"
    before = {key["kid"] for key in (await person.http.get(jwks)).json()["keys"]}

    rotated = (await person.http.post("auth/keys:rotate", json={})).json()

    async def published() -> bool:
        kids = {key["kid"] for key in (await person.http.get(jwks)).json()["keys"]}
        return kids >= before | {rotated["keyId"]}

    await eventually(published, within_seconds=5)
    assert (await person.http.get("users/me")).status_code == 200
