"""What a caller meets at the edge: one test for each promise, against a real Envoy."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import httpx
import pytest
from atelier.task.v1 import task_pb2, task_pb2_grpc
from google.rpc import error_details_pb2, status_pb2

from mesh.control.edge import Rate
from mesh.control.known import Known
from tests.eventually import eventually
from tests.service.control.conftest import HOST, Edge, Keys

pytestmark = pytest.mark.asyncio(loop_scope="module")

TASK = "/api/v1/tasks/tsk_1"


def reason_of(error: grpc.aio.AioRpcError) -> str:
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info.reason


@pytest.mark.parametrize("path", ["/", "/healthz", "/api/v1/version", "/openapi.json", "/.well-known/jwks.json"])
async def test_what_needs_no_token_is_answered_without_one(at_edge: Edge, path: str) -> None:
    answer = await at_edge.client.get(path)

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()
    assert answer.headers["x-request-id"]


async def test_readiness_names_what_is_missing(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/readyz")

    body = await at_edge.refused(answer, 503, "NOT_READY")
    assert body["details"][0]["metadata"] == {"missing": "auth,media,media-http,storage"}
    assert answer.headers["retry-after"] == "1"


async def test_readiness_follows_the_registry(at_edge: Edge) -> None:
    everywhere = at_edge.known.catalog["task"]
    names = ("auth", "media", "media-http", "storage", "storage-http", "task", "user")

    await at_edge.publish(Known(dict.fromkeys(names, everywhere), at_edge.keys.jwks))

    assert (await at_edge.client.get("/readyz")).status_code == 200


async def test_a_call_is_answered_in_json_with_zero_values_and_enum_names(at_edge: Edge) -> None:
    answer = await at_edge.client.get(TASK, headers=at_edge.keys.bearer())

    assert answer.status_code == 200
    body = answer.json()
    assert (body["taskId"], body["state"]) == ("tsk_1", "STATE_QUEUED")
    assert (body["attempt"], body["outputFileIds"]) == (0, [])


@pytest.mark.parametrize(("wait", "seconds"), [("20s", 20), ("0.5s", 0.5)])
async def test_a_duration_may_stand_in_the_query(at_edge: Edge, wait: str, seconds: float) -> None:
    answer = await at_edge.client.get(TASK, params={"wait": wait}, headers=at_edge.keys.bearer())

    assert (answer.status_code, at_edge.tasks.waits[-1]) == (200, seconds), answer.text


async def test_a_duration_that_is_none_is_refused(at_edge: Edge) -> None:
    answer = await at_edge.client.get(TASK, params={"wait": "soon"}, headers=at_edge.keys.bearer())

    assert answer.status_code == 400


async def test_the_service_learns_of_the_token_and_the_caller_and_nothing_forged(at_edge: Edge) -> None:
    forged = {
        "x-atelier-caller": "task", "x-atelier-capability": "forged", "x-envoy-original-path": "/forged",
        "x-request-id": "forged", "idempotency-key": "key-1", "last-event-id": "7", "traceparent": "00-1-2-01",
    }  # fmt: skip

    answer = await at_edge.client.get(TASK, headers={**at_edge.keys.bearer(), **forged})

    seen = at_edge.tasks.metadata
    assert not [name for name in seen if name.startswith("x-atelier-")]
    assert seen["authorization"].startswith("Bearer ey")
    assert (seen["idempotency-key"], seen["last-event-id"]) == ("key-1", "7")
    assert seen["x-request-id"] == answer.headers["x-request-id"] != "forged"


async def test_no_token_is_refused(at_edge: Edge) -> None:
    answer = await at_edge.client.get(TASK)

    await at_edge.refused(answer, 401, "TOKEN_MISSING")
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_token_in_the_query_is_refused(at_edge: Edge) -> None:
    answer = await at_edge.client.get(TASK, params={"access_token": at_edge.keys.token()})

    await at_edge.refused(answer, 401, "TOKEN_MISSING")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_case_of_the_scheme_says_nothing(at_edge: Edge, scheme: str) -> None:
    header = {"authorization": f"{scheme} {at_edge.keys.token()}"}

    answer = await at_edge.client.get(TASK, headers=header)

    assert (answer.status_code, at_edge.tasks.metadata["authorization"]) == (200, header["authorization"])


async def test_an_expired_token_is_refused(at_edge: Edge) -> None:
    answer = await at_edge.client.get(TASK, headers=at_edge.keys.bearer(lives_seconds=-6))

    await at_edge.refused(answer, 401, "TOKEN_EXPIRED")


@pytest.mark.parametrize(
    "claims", [{"iss": "another"}, {"aud": "another"}, {"exp": None}], ids=["issuer", "audience", "no expiry"]
)
async def test_a_token_of_another_kind_is_refused(at_edge: Edge, claims: dict) -> None:
    answer = await at_edge.client.get(TASK, headers=at_edge.keys.bearer(**claims))

    await at_edge.refused(answer, 401, "TOKEN_INVALID")


async def test_a_token_signed_by_another_key_is_refused(at_edge: Edge) -> None:
    answer = await at_edge.client.get(TASK, headers=Keys("k1").bearer())

    await at_edge.refused(answer, 401, "TOKEN_INVALID")


@pytest.mark.parametrize("what", [("jti", "jti_1"), ("sid", "ses_1"), ("gen", "usr_1/1")], ids=lambda what: what[0])
async def test_a_revoked_token_is_refused_in_both_forms(at_edge: Edge, what: tuple[str, str]) -> None:
    await at_edge.publish(replace(at_edge.known, revoked={what: 0.0, ("sid", "ses_9"): 0.0, ("gen", "usr_9/9"): 0.0}))
    everything_else = at_edge.keys.bearer("usr_2", jti="jti_2", sid="ses_2")

    answer = await at_edge.client.get(TASK, headers=at_edge.keys.bearer())
    async with grpc.aio.insecure_channel(f"{HOST}:{at_edge.port}") as channel:
        call = task_pb2_grpc.TaskServiceStub(channel).GetTask(
            task_pb2.GetTaskRequest(task_id="tsk_1"), metadata=list(at_edge.keys.bearer().items())
        )
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call

    await at_edge.refused(answer, 401, "TOKEN_REVOKED")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert (refusal.value.code(), reason_of(refusal.value)) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_REVOKED")
    assert (await at_edge.client.get(TASK, headers=everything_else)).status_code == 200


async def test_nobody_hides_a_revoked_token_behind_headers_of_his_own(at_edge: Edge) -> None:
    await at_edge.publish(replace(at_edge.known, revoked={("sid", "ses_1"): 0.0}))
    forged = {"x-atelier-token-sid": "ses_2"}

    refused = await at_edge.client.get(TASK, headers={**at_edge.keys.bearer(), **forged})
    served = await at_edge.client.get(
        TASK, headers={**at_edge.keys.bearer(sid="ses_2"), "x-atelier-token-sid": "ses_1"}
    )

    await at_edge.refused(refused, 401, "TOKEN_REVOKED")
    assert served.status_code == 200
    assert not [name for name in at_edge.tasks.metadata if name.startswith("x-atelier-token")]


async def test_a_revocation_refuses_new_calls_and_is_taken_while_streams_stay_open(at_edge: Edge) -> None:
    at_edge.tasks.continued.clear()

    async with at_edge.client.stream("GET", f"{TASK}:watch", headers=at_edge.keys.bearer()) as watch:
        lines = watch.aiter_lines()
        assert await anext(lines) == "id: 1"
        await at_edge.publish(replace(at_edge.known, revoked={("sid", "ses_1"): 0.0}))
        await at_edge.refused(await at_edge.client.get(TASK, headers=at_edge.keys.bearer()), 401, "TOKEN_REVOKED")
        at_edge.tasks.continued.set()  # ending a stream is the service's part, which knows whose it is
        assert [line async for line in lines] == ["data: {}", "", ": still here", ""]


async def test_a_new_key_is_taken_while_streams_stay_open(at_edge: Edge) -> None:
    new = Keys("k2")
    both = json.dumps({"keys": json.loads(at_edge.keys.jwks)["keys"] + json.loads(new.jwks)["keys"]})
    at_edge.tasks.continued.clear()

    async with at_edge.client.stream("GET", f"{TASK}:watch", headers=at_edge.keys.bearer()) as watch:
        lines = watch.aiter_lines()
        assert await anext(lines) == "id: 1"
        await at_edge.publish(Known(at_edge.known.catalog, both))
        assert (await at_edge.client.get(TASK, headers=new.bearer())).status_code == 200
        at_edge.tasks.continued.set()
        assert [line async for line in lines] == ["data: {}", "", ": still here", ""]


async def test_calls_that_need_a_token_wait_for_the_first_keys(at_edge: Edge) -> None:
    await at_edge.publish(Known(at_edge.known.catalog, None))

    answer = await at_edge.client.get(TASK, headers=at_edge.keys.bearer())
    await at_edge.refused(answer, 503, "SERVICE_UNAVAILABLE")
    assert answer.headers["retry-after"] == "1"
    assert (await at_edge.client.post("/api/v1/users/login", json={})).status_code == 200


async def test_an_administrators_call_is_refused_to_others(at_edge: Edge) -> None:
    path = "/api/v1/users/usr_2/role:set"

    refused = await at_edge.client.post(path, json={}, headers=at_edge.keys.bearer("usr_admin1"))
    done = await at_edge.client.post(path, json={}, headers=at_edge.keys.bearer("usr_admin1", role="ROLE_ADMIN"))

    await at_edge.refused(refused, 403, "ROLE_REQUIRED")
    assert done.status_code == 200


async def test_each_user_has_a_bucket_of_his_own(at_edge: Edge) -> None:
    async def cancel(user: str) -> httpx.Response:
        return await at_edge.client.post(f"{TASK}:cancel", json={}, headers=at_edge.keys.bearer(user))

    answers = [await cancel("usr_greedy") for _ in range(5)]
    other = await cancel("usr_modest")

    assert [answer.status_code for answer in answers[:3]] == [200, 200, 200]
    await at_edge.refused(answers[-1], 429, "RATE_LIMITED")
    assert answers[-1].headers["retry-after"] == "1"
    assert other.status_code == 200


async def test_calls_without_a_token_draw_from_their_addresss_bucket(at_edge: Edge) -> None:
    answers = [await at_edge.client.post("/api/v1/users/login", json={}) for _ in range(6)]

    await at_edge.refused(answers[-1], 429, "RATE_LIMITED")


async def test_limits_change_without_a_new_listener(at_edge: Edge) -> None:
    await at_edge.publish(settings=replace(at_edge.settings, rates={**at_edge.settings.rates, "READ": Rate(1, 1)}))

    answers = [await at_edge.client.get(TASK, headers=at_edge.keys.bearer("usr_limited")) for _ in range(3)]

    assert answers[-1].status_code == 429


async def test_a_body_beyond_the_bound_is_refused(at_edge: Edge) -> None:
    large = {"requestId": "x" * (1024 * 1024)}

    answer = await at_edge.client.post("/api/v1/tasks", json=large, headers=at_edge.keys.bearer("usr_large"))

    await at_edge.refused(answer, 413, "BODY_TOO_LARGE")


@pytest.mark.parametrize("body", ["{", '{"inputFileId": {}}', "[]", '{"operation": {"resize": {}, "convert": {}}}'])
async def test_a_malformed_body_is_refused_and_the_place_is_told(at_edge: Edge, body: str) -> None:
    headers = {**at_edge.keys.bearer(f"usr_{len(body)}"), "content-type": "application/json"}

    answer = await at_edge.client.post("/api/v1/tasks", content=body, headers=headers)

    refusal = await at_edge.refused(answer, 400, "BODY_MALFORMED")
    assert len(refusal["message"]) > len("The request does not fit this call. ")


async def test_an_unknown_query_parameter_is_refused(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/api/v1/tasks", params={"pagesize": "3"}, headers=at_edge.keys.bearer())

    await at_edge.refused(answer, 400, "QUERY_MALFORMED")


async def test_a_query_parameter_that_cannot_be_read_is_refused_and_named(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/api/v1/tasks", params={"pageSize": "many"}, headers=at_edge.keys.bearer())

    body = await at_edge.refused(answer, 400, "QUERY_MALFORMED")
    assert 'page_size: invalid value "many"' in body["message"]


async def test_known_query_parameters_reach_the_service(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/api/v1/tasks", params={"pageSize": "3"}, headers=at_edge.keys.bearer())

    assert len(answer.json()["tasks"]) == 3


@pytest.mark.parametrize(
    "path", ["/nothing", "/api/v1/nothing", "/internal/v1/results", "/atelier.task.v1.TaskService/ClaimTask"]
)
async def test_what_is_not_there_is_not_found(at_edge: Edge, path: str) -> None:
    answer = await at_edge.client.post(path, json={}, headers=at_edge.keys.bearer())

    await at_edge.refused(answer, 404, "ROUTE_NOT_FOUND")


@pytest.mark.parametrize(
    ("verb", "path", "allowed"),
    [
        ("DELETE", "/api/v1/tasks", "GET, POST"),
        ("GET", "/api/v1/users/login", "POST"),
        ("PUT", "/api/v1/users/usr_1", "GET, PATCH"),
        ("GET", "/api/v1/tasks/tsk_1:cancel", "POST"),
        ("POST", "/healthz", "GET, HEAD"),
    ],
)
async def test_a_known_path_says_how_it_is_called(at_edge: Edge, verb: str, path: str, allowed: str) -> None:
    answer = await at_edge.client.request(verb, path, headers=at_edge.keys.bearer())

    await at_edge.refused(answer, 405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == allowed


async def test_headers_beyond_the_bound_are_refused(at_edge: Edge) -> None:
    answer = await at_edge.client.get(TASK, headers={**at_edge.keys.bearer(), "cookie": "x" * 65 * 1024})

    # Refused before it is a request: without an id.
    assert (answer.status_code, answer.json()["details"][0]["reason"]) == (431, "HEADERS_TOO_LARGE")


@pytest.mark.parametrize("path", ["/", "/healthz", "/openapi.json"])
async def test_what_the_edge_answers_itself_can_be_asked_for_without_its_body(at_edge: Edge, path: str) -> None:
    answer = await at_edge.client.head(path)

    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("deadline", ["1n", "rubbish"])
async def test_a_deadline_of_grpcs_is_nothing_to_a_json_call(at_edge: Edge, deadline: str) -> None:
    answer = await at_edge.client.get(TASK, headers={**at_edge.keys.bearer(), "grpc-timeout": deadline})

    assert answer.status_code == 200


async def test_a_service_without_instances_is_unavailable(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/api/v1/storage/usage", headers=at_edge.keys.bearer())

    await at_edge.refused(answer, 503, "SERVICE_UNAVAILABLE")
    assert answer.headers["retry-after"] == "1"


async def test_a_service_that_does_not_answer_in_time_is_a_timeout(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/api/v1/tasks/tsk_slow", headers=at_edge.keys.bearer())

    await at_edge.refused(answer, 504, "TIMEOUT")


async def test_a_services_refusal_has_the_same_shape(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/api/v1/tasks/tsk_missing", headers=at_edge.keys.bearer())

    body = await at_edge.refused(answer, 404, "TASK_NOT_FOUND")
    assert body["code"] == 5
    assert body["details"][0]["metadata"] == {"task_id": "tsk_missing"}


async def test_an_idempotent_call_is_tried_again(at_edge: Edge) -> None:
    answer = await at_edge.client.get("/api/v1/tasks/tsk_flaky", headers=at_edge.keys.bearer())

    assert (answer.status_code, at_edge.tasks.calls) == (200, 3)


async def test_a_call_that_changes_something_is_not_tried_again(at_edge: Edge) -> None:
    answer = await at_edge.client.post(f"{TASK}:retry", json={}, headers=at_edge.keys.bearer("usr_retry"))

    assert (answer.status_code, at_edge.tasks.calls) == (503, 1)
    assert answer.json()["code"] == 14


async def test_events_pass_as_they_come(at_edge: Edge) -> None:
    at_edge.tasks.continued.clear()
    headers = {**at_edge.keys.bearer(), "accept-encoding": "gzip"}

    async with at_edge.client.stream("GET", f"{TASK}:watch", headers=headers) as watch:
        first = await asyncio.wait_for(anext(watch.aiter_bytes()), 3)

    assert watch.headers["content-type"] == "text/event-stream"
    assert "content-encoding" not in watch.headers
    assert first == b"id: 1\ndata: {}\n\n"


async def test_who_does_not_read_holds_up_nobody_else(at_edge: Edge) -> None:
    def stand_still() -> bool:
        return time.monotonic() - at_edge.tasks.flooded_at > 0.5

    async with AsyncExitStack() as stack:
        for _ in range(8):
            flood = at_edge.client.stream("GET", "/api/v1/tasks/tsk_flood:watch", headers=at_edge.keys.bearer())
            await stack.enter_async_context(flood)
        await eventually(stand_still, within_seconds=30)

        answers = [await at_edge.client.get(TASK, headers=at_edge.keys.bearer()) for _ in range(10)]

    assert [answer.status_code for answer in answers] == [200] * 10


async def test_large_json_is_compressed(at_edge: Edge) -> None:
    headers = {**at_edge.keys.bearer(), "accept-encoding": "gzip"}

    answer = await at_edge.client.get("/api/v1/tasks", params={"pageSize": "100"}, headers=headers)

    assert answer.headers["content-encoding"] == "gzip"
    assert len(answer.json()["tasks"]) == 100


async def test_bytes_reach_the_http_listener_whole(at_edge: Edge) -> None:
    headers = {**at_edge.keys.bearer(), "x-atelier-capability": "forged", "content-type": "image/png"}

    answer = await at_edge.client.post("/api/v1/files?name=a.png", content=b"x" * 3_000_000, headers=headers)

    assert answer.status_code == 201
    body = answer.json()
    assert (body["path"], body["bytes"]) == ("/api/v1/files", 3_000_000)
    assert not [name for name in body["headers"] if name.startswith("x-atelier-")]


async def test_bytes_need_a_token_too(at_edge: Edge) -> None:
    answer = await at_edge.client.post("/api/v1/files?name=a.png", content=b"x")

    await at_edge.refused(answer, 401, "TOKEN_MISSING")


async def test_an_rpc_of_bytes_is_not_there_for_grpc(at_edge: Edge) -> None:
    headers = {**at_edge.keys.bearer(), "content-type": "application/json"}

    answer = await at_edge.client.post("/atelier.storage.v1.StorageService/UploadFile", content=b"", headers=headers)

    await at_edge.refused(answer, 404, "ROUTE_NOT_FOUND")


async def test_a_page_of_this_machine_may_call_and_read_the_refusal(at_edge: Edge) -> None:
    origin = {"origin": "http://localhost:5173"}

    asked = await at_edge.client.options(
        TASK,
        headers={**origin, "access-control-request-method": "GET", "access-control-request-headers": "authorization"},
    )
    refused = await at_edge.client.get(TASK, headers=origin)
    unknown = await at_edge.client.get("/nothing", headers=origin)

    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == origin["origin"]
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert refused.headers["access-control-allow-origin"] == origin["origin"]
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    assert unknown.headers["access-control-allow-origin"] == "*"


async def test_a_page_from_elsewhere_may_not(at_edge: Edge) -> None:
    origin = {"origin": "http://localhost.evil.example"}

    asked = await at_edge.client.options(TASK, headers={**origin, "access-control-request-method": "GET"})
    answer = await at_edge.client.get(TASK, headers={**origin, **at_edge.keys.bearer()})

    assert "access-control-allow-origin" not in asked.headers
    assert "access-control-allow-origin" not in answer.headers


async def test_grpc_callers_are_told_in_grpc(at_edge: Edge) -> None:
    async with grpc.aio.insecure_channel(f"{HOST}:{at_edge.port}") as channel:
        stub = task_pb2_grpc.TaskServiceStub(channel)
        token = tuple(at_edge.keys.bearer().items())
        task = await stub.GetTask(task_pb2.GetTaskRequest(task_id="tsk_1"), metadata=token)
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await stub.GetTask(task_pb2.GetTaskRequest(task_id="tsk_1"))
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.GetTask(task_pb2.GetTaskRequest(task_id="tsk_slow"), metadata=token)
        with pytest.raises(grpc.aio.AioRpcError) as closed:
            await stub.ClaimTask(task_pb2.ClaimTaskRequest(), metadata=token)

    assert task.task_id == "tsk_1"
    assert (missing.value.code(), reason_of(missing.value)) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    assert missing.value.details() == "Sign in first: send `Authorization: Bearer <access token>`."
    assert (late.value.code(), reason_of(late.value)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIMEOUT")
    assert (closed.value.code(), reason_of(closed.value)) == (grpc.StatusCode.UNIMPLEMENTED, "ROUTE_NOT_FOUND")


async def test_grpc_web_callers_are_served(at_edge: Edge) -> None:
    message = task_pb2.GetTaskRequest(task_id="tsk_1").SerializeToString()
    framed = b"\x00" + len(message).to_bytes(4, "big") + message
    headers = {**at_edge.keys.bearer(), "content-type": "application/grpc-web+proto"}

    answer = await at_edge.client.post("/atelier.task.v1.TaskService/GetTask", content=framed, headers=headers)
    del headers["authorization"]
    refused = await at_edge.client.post("/atelier.task.v1.TaskService/GetTask", content=framed, headers=headers)

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/grpc-web+proto")
    assert b"tsk_1" in answer.content
    assert b"grpc-status:0" in answer.content
    assert (refused.status_code, refused.headers["grpc-status"]) == (401, "16")


async def test_envoy_takes_all_of_it_without_a_warning(at_edge: Edge) -> None:
    log = at_edge.log.read_text()

    assert "rejected" not in log
    assert "eprecated" not in log
    assert "will be ignored" not in log
