"""Bad input: a clear refusal in the one agreed shape, and nothing left behind."""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt
import pytest

from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person, registered
from tests.photographs import photograph
from tests.system.test_main_job import upload, watched

RESIZE = {"resize": {"width": 320}}


def require_refusal(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """Check the shape of a refusal and return its ErrorInfo's metadata."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-request-id"]
    body = response.json()
    assert body["code"] > 0
    assert body["message"]
    assert "Traceback" not in response.text
    (info,) = [detail for detail in body["details"] if detail["@type"].endswith("google.rpc.ErrorInfo")]
    assert (info["reason"], info["domain"]) == (reason, "atelier")
    return info.get("metadata", {})


async def require_nothing_left(person: Person) -> None:
    """Check that no task exists and that no quota is used or reserved for one."""
    assert (await person.http.get("tasks")).json()["tasks"] == []
    quota = (await person.http.get("users/me/quota")).json()
    assert (quota["tasks"]["used"], quota["tasks"]["reserved"]) == ("0", "0")


async def test_no_token(http: httpx.AsyncClient) -> None:
    response = await http.get("tasks")

    require_refusal(response, 401, "TOKEN_MISSING")
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_an_expired_token(mesh: Mesh, http: httpx.AsyncClient, person: Person) -> None:
    with sqlite3.connect(mesh.var / "data" / "auth.db") as database:
        kid, pem = database.execute("SELECT key_id, private_pem FROM signing_key ORDER BY sign_time").fetchone()
    claims = jwt.decode(person.token, options={"verify_signature": False})
    old = jwt.encode(
        {**claims, "iat": int(time.time()) - 600, "exp": int(time.time()) - 300},
        pem,
        algorithm="ES256",
        headers={"kid": kid},
    )

    response = await http.get("tasks", headers={"authorization": f"Bearer {old}"})

    require_refusal(response, 401, "TOKEN_EXPIRED")


async def test_the_case_of_the_scheme_says_nothing(person: Person) -> None:
    for path in ("tasks", "files/fil_1/content"):
        response = await person.http.get(path, headers={"authorization": f"bearer {person.token}"})

        assert response.status_code in (200, 404)


@pytest.mark.parametrize("token", ["nonsense", "a.b.c", "eyJhbGciOiJub25lIn0.e30."])
async def test_a_forged_token(http: httpx.AsyncClient, token: str) -> None:
    response = await http.get("tasks", headers={"authorization": f"Bearer {token}"})

    require_refusal(response, 401, "TOKEN_INVALID")


async def test_identity_headers_from_outside_say_nothing(http: httpx.AsyncClient) -> None:
    response = await http.get("tasks", headers={"x-atelier-caller": "task", "x-atelier-user": "usr_1"})

    require_refusal(response, 401, "TOKEN_MISSING")


async def test_another_users_file_is_as_a_missing_one(person: Person, another: Person) -> None:
    theirs = (await upload(another, photograph()))["fileId"]

    answers = []
    for file_id in (theirs, "fil_00000000000000000000000000"):
        require_refusal(await person.http.get(f"files/{file_id}"), 404, "FILE_NOT_FOUND")
        require_refusal(await person.http.get(f"files/{file_id}/content"), 404, "FILE_NOT_FOUND")
        response = await person.http.post("tasks", json={"inputFileId": file_id, "operation": RESIZE})
        require_refusal(response, 404, "FILE_NOT_FOUND")
        answers.append(response.json()["message"].replace(file_id, ""))

    assert answers[0] == answers[1]
    await require_nothing_left(person)


async def test_another_users_task_is_as_a_missing_one(person: Person, another: Person) -> None:
    file = await upload(another, photograph())
    task = (await another.http.post("tasks", json={"inputFileId": file["fileId"], "operation": RESIZE})).json()

    require_refusal(await person.http.get(f"tasks/{task['taskId']}"), 404, "TASK_NOT_FOUND")
    require_refusal(await person.http.post(f"tasks/{task['taskId']}:cancel", json={}), 404, "TASK_NOT_FOUND")


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (None, "OPERATION_REQUIRED"),
        ({}, "OPERATION_REQUIRED"),
        ({"frobnicate": {}}, "OPERATION_REQUIRED"),
        ({"resize": {}}, "SIZE_REQUIRED"),
        ({"resize": {"width": 0}}, "FIELD_OUT_OF_RANGE"),
        ({"resize": {"width": -5}}, "FIELD_OUT_OF_RANGE"),
        ({"resize": {"width": 100_000}}, "FIELD_OUT_OF_RANGE"),
        ({"smartCrop": {"width": 0, "height": 10}}, "WIDTH_REQUIRED"),
        ({"convert": {}}, "FORMAT_REQUIRED"),
    ],
)
async def test_a_wrong_operation(person: Person, operation: Any, reason: str) -> None:
    file = await upload(person, photograph())
    body = {"inputFileId": file["fileId"]} | ({} if operation is None else {"operation": operation})

    metadata = require_refusal(await person.http.post("tasks", json=body), 400, reason)

    if reason == "OPERATION_REQUIRED":
        assert metadata["known"].startswith("resize")
    await require_nothing_left(person)


async def test_invalid_json(person: Person) -> None:
    for body in ("{", '{"inputFileId": 5, "operation": []}', '{"operation": {"resize": {"width": "wide"}}}'):
        response = await person.http.post("tasks", content=body, headers={"content-type": "application/json"})
        require_refusal(response, 400, "BODY_MALFORMED")


async def test_a_query_that_does_not_fit(person: Person) -> None:
    require_refusal(await person.http.get("tasks", params={"pageSize": "abc"}), 400, "QUERY_MALFORMED")
    require_refusal(await person.http.get("tasks", params={"colour": "red"}), 400, "QUERY_MALFORMED")
    require_refusal(
        await person.http.post("files", params={"name": "a.jpg", "colour": "red"}, content=photograph().read_bytes()),
        400,
        "QUERY_MALFORMED",
    )


async def test_a_json_body_over_the_limit(person: Person) -> None:
    response = await person.http.post("tasks", json={"inputFileId": "x" * (1024 * 1024 + 1)})

    require_refusal(response, 413, "BODY_TOO_LARGE")


async def test_a_file_over_the_limit(person: Person) -> None:
    response = await person.http.post("files", params={"name": "big.bin"}, content=bytes(64 * 1024 * 1024 + 1))

    require_refusal(response, 413, "FILE_TOO_LARGE")
    assert (await person.http.get("files")).json()["files"] == []


async def test_an_empty_body(person: Person) -> None:
    require_refusal(await person.http.post("files", params={"name": "a.jpg"}, content=b""), 400, "FILE_EMPTY")
    assert (await person.http.get("files")).json()["files"] == []


async def test_a_text_file_named_jpg(person: Person) -> None:
    metadata = require_refusal(
        await person.http.post(
            "files", params={"name": "a.jpg"}, content=b"I am a letter.", headers={"content-type": "image/jpeg"}
        ),
        400,
        "CONTENT_TYPE_MISMATCH",
    )

    assert metadata["declared"] == "image/jpeg"
    usage = (await person.http.get("storage/usage")).json()
    assert usage == {"fileCount": "0", "sizeBytes": "0"}


async def test_a_text_file_is_no_input(person: Person) -> None:
    response = await person.http.post("files", params={"name": "a.txt"}, content=b"I am a letter.")
    assert response.status_code == 200, response.text

    refused = await person.http.post("tasks", json={"inputFileId": response.json()["fileId"], "operation": RESIZE})

    assert require_refusal(refused, 400, "INPUT_UNSUPPORTED")["content_type"] == "text/plain"
    await require_nothing_left(person)


async def test_a_truncated_jpeg_fails_its_task_and_costs_nothing(person: Person) -> None:
    whole = photograph().read_bytes()
    file = await person.http.post(
        "files", params={"name": "half.jpg"}, content=whole[: len(whole) // 2], headers={"content-type": "image/jpeg"}
    )
    task = (await person.http.post("tasks", json={"inputFileId": file.json()["fileId"], "operation": RESIZE})).json()

    final = await watched(person.http, task["taskId"])

    assert final["state"] == "STATE_FAILED"
    assert final["error"]["reason"] == "INPUT_DAMAGED"
    assert final["outputFileIds"] == []

    async def refunded() -> bool:
        tasks = (await person.http.get("users/me/quota")).json()["tasks"]
        return (tasks["used"], tasks["reserved"]) == ("0", "0")

    await eventually(refunded, within_seconds=15)
    assert len((await person.http.get("files")).json()["files"]) == 1


async def test_a_quota_used_up(mesh: Mesh, person: Person) -> None:
    """R-09: the user service refuses, within a call to the task service."""
    url = f"{mesh.url}/api/v1/users:grantAdmin"  # whole, because `users:` alone reads like a scheme
    async with registered(mesh.url) as chief:
        granted = await chief.http.post(url, json={"login": chief.username, "secret": "wrong"})
        require_refusal(granted, 403, "SECRET_INVALID")
        granted = await chief.http.post(url, json={"login": chief.username, "secret": mesh.secret("admin")})
        assert granted.json()["role"] == "ROLE_ADMIN"
        await chief.sign_in()
        limited = await chief.http.post(f"users/{person.user_id}/quota:set", json={"tasks": 1})
        assert limited.status_code == 200, limited.text
    file = await upload(person, photograph())

    first = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": RESIZE})
    assert first.status_code == 200, first.text
    await watched(person.http, first.json()["taskId"])

    async def used() -> bool:
        return (await person.http.get("users/me/quota")).json()["tasks"]["used"] == "1"

    await eventually(used, within_seconds=15)  # else it is only set aside, and may come back

    refused = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": RESIZE})

    metadata = require_refusal(refused, 429, "QUOTA_EXCEEDED")
    assert metadata == {"metric": "tasks", "limit": "1", "used": "1", "requested": "1"}
    reset = datetime.fromisoformat((await person.http.get("users/me/quota")).json()["resetTime"])
    until_reset_seconds = (reset - datetime.now(UTC)).total_seconds()
    assert abs(int(refused.headers["retry-after"]) - until_reset_seconds) < 60
    tasks = (await person.http.get("tasks")).json()["tasks"]
    assert [task["taskId"] for task in tasks] == [first.json()["taskId"]]


async def test_only_an_administrator_sets_limits(person: Person) -> None:
    response = await person.http.post(f"users/{person.user_id}/quota:set", json={"tasks": 10_000})

    require_refusal(response, 403, "ROLE_REQUIRED")


async def test_a_path_that_is_not_there(http: httpx.AsyncClient) -> None:
    require_refusal(await http.get("nothing"), 404, "ROUTE_NOT_FOUND")


async def test_a_verb_that_a_path_does_not_know(http: httpx.AsyncClient) -> None:
    response = await http.put("tasks")

    require_refusal(response, 405, "METHOD_NOT_ALLOWED")
    assert "POST" in response.headers["allow"]


async def test_rpcs_of_services_are_not_at_the_edge(mesh: Mesh) -> None:
    async with httpx.AsyncClient(base_url=mesh.url) as client:
        for path in ("/internal/v1/results", "/internal/v1/inputs/fil_1"):
            require_refusal(await client.get(path), 404, "ROUTE_NOT_FOUND")
