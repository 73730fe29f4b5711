"""The HTTP listener: the same policy as gRPC's, refusals in JSON, callers that go away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mesh import context, contract, errors
from mesh import http as http_listener
from mesh.contract import Contract
from mesh.identity import Verifier
from mesh.intentions import Intention, Intentions
from tests.authority import leaf
from tests.eventually import eventually
from tests.mesh_server import SERVICE, headers, serving

UPLOAD = "/atelier.storage.v1.StorageService/UploadFile"
CONTENT = "/atelier.storage.v1.StorageService/GetFileContent"
READ_INPUT = "/atelier.storage.v1.StorageService/ReadInput"

KEEPING = httpx.Limits(keepalive_expiry=60)

Endpoint = Callable[[Request], Awaitable[Response]]


@asynccontextmanager
async def listening(
    endpoint: Endpoint, name: str = UPLOAD, seconds: float = 600.0, caller: str = "edge"
) -> AsyncIterator[httpx.AsyncClient]:
    methods = contract.installed().methods
    rpcs = Contract({**methods, name: replace(methods[name], deadline_seconds=seconds)})
    async with (
        serving(http={name: endpoint}, rpcs=rpcs) as server,
        httpx.AsyncClient(
            base_url=server.http_url, headers=headers("usr_1"), verify=server.tls(caller), limits=KEEPING
        ) as client,
    ):
        yield client


async def whoami(request: Request) -> Response:
    present = context.present()
    return JSONResponse(
        {
            "caller": present.caller,
            "user": present.user.user_id if present.user else None,
            "request_id": present.request_id,
            "bytes": len(await request.body()),
            "path": request.path_params,
        }
    )


def failing(error: Exception) -> Endpoint:
    async def fail(request: Request) -> Response:
        raise error

    return fail


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def reason(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/json"
    (info,) = (each for each in answer.json()["details"] if each["@type"] == "type.googleapis.com/google.rpc.ErrorInfo")
    assert (info["domain"], bool(answer.json()["message"])) == ("atelier", True)
    return info["reason"]


async def test_the_endpoint_knows_who_calls_for_whom() -> None:
    async with listening(whoami) as client:
        answer = await client.post("/api/v1/files", content=b"12345")

    assert answer.json() == {"caller": "edge", "user": "usr_1", "request_id": "req-test", "bytes": 5, "path": {}}


async def test_the_path_is_the_contracts() -> None:
    async with listening(whoami, CONTENT) as client:
        answer = await client.get("/api/v1/files/fil_1/content")

    assert answer.json()["path"] == {"file_id": "fil_1"}


async def test_without_a_token_the_answer_is_401_with_a_challenge() -> None:
    async with listening(whoami) as client:
        del client.headers["authorization"]
        answer = await client.post("/api/v1/files")

    assert (answer.status_code, reason(answer)) == (401, "TOKEN_MISSING")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["code"] == 16


async def test_a_service_that_the_policy_does_not_name_is_refused() -> None:
    async with listening(whoami, READ_INPUT) as client:
        refused = await client.get("/internal/v1/inputs/fil_1", headers={"x-atelier-caller": "media-worker"})
    async with listening(whoami, READ_INPUT, caller="media-worker") as client:
        let_in = await client.get("/internal/v1/inputs/fil_1")

    assert (refused.status_code, reason(refused)) == (403, "CALLER_NOT_ALLOWED")
    assert (let_in.status_code, let_in.json()["user"]) == (200, None)


async def test_an_endpoints_error_is_the_documented_refusal() -> None:
    error = errors.InvalidArgument("Bad.", metadata={"name": "x"}, violations={"name": "too long"})
    async with listening(failing(error)) as client:
        answer = await client.post("/api/v1/files")

    assert answer.status_code == 400
    assert answer.json() == {
        "code": 3,
        "message": "Bad.",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "INVALID_ARGUMENT",
                "domain": "atelier",
                "metadata": {"name": "x"},
            },
            {
                "@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [{"field": "name", "description": "too long"}],
            },
        ],
    }


async def test_each_kind_of_refusal_has_its_status() -> None:
    expected = {
        "BODY_TOO_LARGE": (errors.PayloadTooLarge, 413, 3),
        "RANGE_NOT_SATISFIABLE": (errors.RangeNotSatisfiable, 416, 11),
        "NOT_FOUND": (errors.NotFound, 404, 5),
        "ALREADY_EXISTS": (errors.AlreadyExists, 409, 6),
        "RESOURCE_EXHAUSTED": (errors.ResourceExhausted, 429, 8),
        "UNAVAILABLE": (errors.Unavailable, 503, 14),
    }

    async def fail(request: Request) -> Response:
        raise expected[(await request.body()).decode()][0]("No.")

    async with listening(fail) as client:
        answers = {name: await client.post("/api/v1/files", content=name) for name in expected}

    for name, (_, status_code, code) in expected.items():
        answer = answers[name]
        assert (answer.status_code, reason(answer), answer.json()["code"]) == (status_code, name, code)


async def test_the_time_to_retry_is_a_header() -> None:
    async with listening(failing(errors.Unavailable("Later.", retry_after_seconds=1.5))) as client:
        answer = await client.post("/api/v1/files")

    assert answer.headers["retry-after"] == "2"


async def test_a_bug_is_logged_and_its_text_kept_from_the_caller(caplog) -> None:
    async with listening(failing(ValueError("password=hunter2"))) as client:
        answer = await client.post("/api/v1/files")

    assert (answer.status_code, reason(answer)) == (500, "INTERNAL")
    assert "hunter2" not in answer.text
    assert "req-test" in answer.json()["message"]
    assert "hunter2" in caplog.text
    assert bugs(caplog) == [f"{UPLOAD} failed"]


async def test_the_policys_deadline_ends_a_call(caplog) -> None:
    async def for_ever(request: Request) -> Response:
        await asyncio.sleep(30)
        return Response()

    async with listening(for_ever, seconds=0.1) as client:
        answer = await client.post("/api/v1/files")

    assert (answer.status_code, reason(answer)) == (504, "DEADLINE_EXCEEDED")
    assert bugs(caplog) == []


async def test_a_timeout_of_the_endpoints_own_is_a_bug(caplog) -> None:
    async with listening(failing(TimeoutError())) as client:
        answer = await client.post("/api/v1/files")

    assert answer.status_code == 500
    assert bugs(caplog) == [f"{UPLOAD} failed"]


async def test_what_is_not_in_the_contract_is_not_there() -> None:
    calls = [("GET", "/"), ("POST", "/api/v1/nothing"), ("GET", "/api/v1/files"), ("POST", "/api/v1/files/")]
    async with listening(whoami) as client:
        answers = [await client.request(*call) for call in calls]

    assert [(answer.status_code, reason(answer)) for answer in answers] == [(404, "ROUTE_NOT_FOUND")] * len(calls)


async def test_an_intention_refuses_on_connections_that_are_open_and_lets_in_when_it_goes() -> None:
    async with (
        serving(http={UPLOAD: whoami}) as server,
        httpx.AsyncClient(base_url=server.http_url, headers=headers("usr_1"), verify=server.tls("edge")) as client,
    ):
        before = await client.post("/api/v1/files")
        server.intend(Intention("edge", "storage", 9, allows=False))
        refused = await client.post("/api/v1/files")
        server.intend()
        after = await client.post("/api/v1/files")

    assert (before.status_code, refused.status_code, after.status_code) == (200, 403, 200)
    assert reason(refused) == "CALLER_DENIED_BY_INTENTION"


async def test_an_rpc_that_is_not_for_bytes_cannot_be_served_here() -> None:
    with pytest.raises(ValueError, match="does not say `bytes`"):
        http_listener.application(
            {"/atelier.storage.v1.StorageService/GetFile": whoami},
            Verifier(),
            Intentions(leaf(SERVICE)),
            contract.installed(),
        )


@asynccontextmanager
async def raw(client: httpx.AsyncClient, head: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Hold a connection on which `head` and the usual headers have been sent."""
    address = urlsplit(str(client.base_url))
    reader, writer = await asyncio.open_connection(address.hostname, address.port, ssl=leaf("edge").tls_client(SERVICE))
    lines = [head, "host: test", *(f"{name}: {value}" for name, value in headers("usr_1").items())]
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode())
        await writer.drain()
        yield reader, writer
    finally:
        writer.close()


async def test_a_caller_that_goes_away_in_its_upload_is_no_bug(caplog) -> None:
    caplog.set_level(logging.INFO)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def take(request: Request) -> Response:
        try:
            async for _ in request.stream():
                begun.set()
            return Response()
        finally:
            ended.set()

    async with listening(take) as client:
        async with raw(client, "POST /api/v1/files HTTP/1.1\r\ncontent-length: 1000") as (_, writer):
            writer.write(b"12345")
            await begun.wait()
        await asyncio.wait_for(ended.wait(), 2)
        assert (await client.get("/")).status_code == 404  # it goes on

    assert bugs(caplog) == []


@pytest.mark.parametrize(
    "answer", [StreamingResponse, lambda pieces: http_listener.Streamed(pieces, 200, {})], ids=["Starlette's", "ours"]
)
async def test_a_caller_that_goes_away_in_its_download_is_no_bug(caplog, answer) -> None:
    caplog.set_level(logging.INFO)
    ended = asyncio.Event()

    async def blocks() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)  # as reading a file would
        finally:
            ended.set()

    async def give(request: Request) -> Response:
        return answer(blocks())

    async with listening(give, CONTENT) as client:
        async with raw(client, "GET /api/v1/files/fil_1/content HTTP/1.1") as (reader, _):
            await reader.readexactly(1000)
        await asyncio.wait_for(ended.wait(), 5)
        assert (await client.get("/")).status_code == 404

    assert bugs(caplog) == []


@dataclass
class Waiting:
    listener: http_listener.Listener
    running: asyncio.Task[None]
    call: asyncio.Task[httpx.Response]
    go_on: asyncio.Event


@asynccontextmanager
async def waiting(drain_seconds: float) -> AsyncIterator[Waiting]:
    """Hold a listener with one request under way."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait(request: Request) -> Response:
        begun.set()
        await go_on.wait()
        return Response("done")

    verifier, intentions = Verifier(), Intentions(leaf(SERVICE))
    intentions.take([])
    application = http_listener.application({READ_INPUT: wait}, verifier, intentions, contract.installed())
    listener = http_listener.Listener(application, "127.0.0.1", 0, leaf(SERVICE), drain_seconds)
    running = asyncio.create_task(listener.run())
    async with httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{listener.port}", verify=leaf("media-worker").tls_client(SERVICE)
    ) as client:
        call = asyncio.create_task(client.get("/internal/v1/inputs/fil_1"))
        await begun.wait()
        yield Waiting(listener, running, call, go_on)
        go_on.set()


async def test_a_listener_that_stops_finishes_what_is_under_way() -> None:
    async with waiting(drain_seconds=10) as held:
        held.listener.stop()
        await eventually(lambda: _refuses(held.listener.port))
        held.go_on.set()

        assert (await held.call).text == "done"
        await asyncio.wait_for(held.running, 5)


async def test_an_idle_connection_is_still_there_for_the_next_request() -> None:
    asked_over = []

    async def answer(request: Request) -> Response:
        asked_over.append(request.client)
        return Response("done")

    async with listening(answer, READ_INPUT, caller="media-worker") as client:
        await client.get("/internal/v1/inputs/fil_1")
        await asyncio.sleep(6)  # longer than uvicorn's own 5 s; the client gives a connection up itself at some time
        await client.get("/internal/v1/inputs/fil_1")

    assert len(asked_over) == 2
    assert len(set(asked_over)) == 1


async def test_a_listener_that_stops_gives_a_hung_request_drain_seconds() -> None:
    async with waiting(drain_seconds=1) as held:
        began = time.monotonic()

        held.listener.stop()

        await asyncio.wait_for(held.running, 10)
        assert time.monotonic() - began >= 1
        answer = await held.call
        assert (answer.status_code, answer.json()["details"][0]["reason"]) == (503, "DRAINING")


async def _refuses(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False
