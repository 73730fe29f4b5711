"""What stands before a handler, and what a caller is told: over the real server, channel and wire."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import grpc
import pytest
from atelier.auth.v1 import auth_pb2, auth_pb2_grpc
from atelier.mesh.v1 import identity_pb2, identity_pb2_grpc
from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc
from google.protobuf import empty_pb2

from mesh import channel, context, contract, errors, service, status, telemetry
from mesh.channel import MeshChannel
from mesh.contract import Contract
from mesh.errors import MeshError
from mesh.intentions import Intention
from tests.eventually import eventually
from tests.mesh_server import JWKS, NARROW, Server, headers, serving

TASK = "/atelier.task.v1.TaskService"
FAR_AWAY_SECONDS = 30.0


def with_deadlines(**seconds: float) -> Contract:
    """Return the installed contract with other deadlines for some rpcs, by the rpc's last name."""
    return Contract(
        {
            name: replace(method, deadline_seconds=seconds.get(name.rpartition("/")[2], method.deadline_seconds))
            for name, method in contract.installed().methods.items()
        }
    )


class Tasks(task_pb2_grpc.TaskServiceServicer):
    """Does in GetTask and WatchTask what a test says, and remembers what came in."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.requests: list[context.Request] = []
        self.get: Callable = self.answer
        self.watch: Callable = self._three
        self.ended = asyncio.Event()

    def _note(self, request: object) -> None:
        self.calls.append(request)
        self.requests.append(context.present())

    async def answer(self, request):
        return task_pb2.Task(task_id=request.task_id)

    async def _three(self, request):
        for number in range(3):
            yield task_pb2.WatchTaskResponse(cursor=str(number))

    async def GetTask(self, request, _):
        self._note(request)
        try:
            return await self.get(request)
        finally:
            self.ended.set()

    async def CreateTask(self, request, _):
        self._note(request)
        return task_pb2.Task(task_id=request.request_id)

    async def ClaimTask(self, request, _):
        self._note(request)
        return task_pb2.ClaimTaskResponse()

    async def WatchTask(self, request, _):
        self._note(request)
        try:
            async for each in self.watch(request):
                yield each
        finally:
            self.ended.set()


class Auth(auth_pb2_grpc.AuthServiceServicer):
    def __init__(self) -> None:
        self.failure: MeshError | None = None
        self.entered = asyncio.Event()
        self.wait = False

    async def RotateKeys(self, request, _):
        self.entered.set()
        if self.wait:
            await asyncio.sleep(FAR_AWAY_SECONDS)
        if self.failure:
            raise self.failure
        return auth_pb2.RotateKeysResponse()


class Storage(storage_pb2_grpc.StorageServiceServicer):
    def __init__(self) -> None:
        self.request: context.Request | None = None
        self.seconds_left = 0.0
        self.entered, self.ended = asyncio.Event(), asyncio.Event()
        self.wait = False

    async def StatFile(self, request, _):
        self.request, self.seconds_left = context.present(), context.seconds_left()
        self.entered.set()
        try:
            if self.wait:
                await asyncio.sleep(FAR_AWAY_SECONDS)
            return storage_pb2.File()
        finally:
            self.ended.set()


@asynccontextmanager
async def tasks_served(
    tasks: Tasks, reader_seconds: float = service.READER_SECONDS, **seconds: float
) -> AsyncIterator[Server]:
    add = partial(task_pb2_grpc.add_TaskServiceServicer_to_server, tasks)
    async with serving(add, rpcs=with_deadlines(**seconds), reader_seconds=reader_seconds) as server:
        yield server


@pytest.fixture
def tasks() -> Tasks:
    return Tasks()


@pytest.fixture
async def server(tasks: Tasks) -> AsyncIterator[Server]:
    async with tasks_served(tasks) as running:
        yield running


def people(server: Server, user: str | None = "usr_1", **identity: object) -> task_pb2_grpc.TaskServiceStub:
    return task_pb2_grpc.TaskServiceStub(server.channel(user=user, **identity))


@asynccontextmanager
async def bare(server: Server) -> AsyncIterator[task_pb2_grpc.TaskServiceStub]:
    """Hold a stub of plain gRPC: no deadline, no metadata, no errors of ours."""
    async with server.bare() as plain:
        yield task_pb2_grpc.TaskServiceStub(plain)


def metadata(user: str | None = "usr_1", **identity: object) -> list[tuple[str, str]]:
    return list(headers(user, **identity).items())


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


GET = task_pb2.GetTaskRequest(task_id="tsk_1")
WATCH = task_pb2.WatchTaskRequest(task_id="tsk_1")


# Who may call


@pytest.mark.parametrize("caller", ["media-worker", "user", "Edge", "task"])
async def test_a_service_that_the_policy_does_not_name_is_refused_before_the_handler(server, tasks, caller) -> None:
    with pytest.raises(errors.PermissionDenied) as refused:
        await people(server, caller=caller).GetTask(GET)

    assert (refused.value.reason, refused.value.metadata["caller"]) == ("CALLER_NOT_ALLOWED", caller)
    assert tasks.calls == []


async def test_the_edge_may_not_call_what_is_for_services(server, tasks) -> None:
    with pytest.raises(errors.PermissionDenied) as refused:
        await people(server).ClaimTask(task_pb2.ClaimTaskRequest(pool="cpu", worker_id="w"))

    assert refused.value.reason == "CALLER_NOT_ALLOWED"


async def test_a_named_service_needs_no_user(server, tasks) -> None:
    await people(server, user=None, caller="media-worker").ClaimTask(
        task_pb2.ClaimTaskRequest(pool="cpu", worker_id="w")
    )

    assert (tasks.requests[0].caller, tasks.requests[0].user) == ("media-worker", None)


async def test_without_a_user_a_call_for_users_is_refused(server, tasks) -> None:
    with pytest.raises(errors.Unauthenticated) as refused:
        await people(server, user=None).GetTask(GET)

    assert refused.value.reason == "TOKEN_MISSING"
    assert tasks.calls == []


async def test_a_wrong_caller_is_told_before_a_missing_token(server) -> None:
    with pytest.raises(errors.PermissionDenied):
        await people(server, user=None, caller="stranger").GetTask(GET)


async def test_a_refused_caller_is_told_how_to_sign_in(server) -> None:
    async with bare(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetTask(GET, metadata=metadata(user=None))

    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert dict(refused.value.trailing_metadata())["www-authenticate"] == "Bearer"


async def test_the_handler_knows_who_calls_for_whom(server, tasks) -> None:
    await people(server, role="ROLE_VIP").GetTask(GET)

    (request,) = tasks.requests
    assert (request.caller, request.user.user_id, request.user.role) == ("edge", "usr_1", "ROLE_VIP")
    assert request.request_id == "req-test"


async def test_a_request_without_an_id_is_given_one(server, tasks) -> None:
    async with bare(server) as stub:
        await stub.GetTask(GET, metadata=[each for each in metadata() if each[0] != "x-request-id"])

    assert len(tasks.requests[0].request_id) == 36


async def test_two_calls_of_one_channel_do_not_see_each_other(server, tasks) -> None:
    both = asyncio.Barrier(2)

    async def meet(request):
        await both.wait()
        return task_pb2.Task(task_id=context.user().user_id)

    tasks.get = meet
    answers = await asyncio.gather(people(server, "usr_1").GetTask(GET), people(server, "usr_2").GetTask(GET))

    assert [answer.task_id for answer in answers] == ["usr_1", "usr_2"]


async def test_an_rpc_without_a_policy_is_nobodys_to_call(caplog) -> None:
    async def answer(request, _):
        return request

    handler = grpc.method_handlers_generic_handler(
        "atelier.task.v1.Unknown",
        {
            "Do": grpc.unary_unary_rpc_method_handler(
                answer, empty_pb2.Empty.FromString, empty_pb2.Empty.SerializeToString
            )
        },
    )
    async with (
        serving(lambda server: server.add_generic_rpc_handlers((handler,))) as server,
        server.bare() as plain,
    ):
        call = plain.unary_unary("/atelier.task.v1.Unknown/Do", empty_pb2.Empty.SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(empty_pb2.Empty(), metadata=metadata())

    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Roles and audit


@asynccontextmanager
async def auth_served(auth: Auth) -> AsyncIterator[Server]:
    async with serving(partial(auth_pb2_grpc.add_AuthServiceServicer_to_server, auth)) as server:
        yield server


def audited(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str, str]]:
    return [
        (record.getMessage().rpartition("/")[2], record.caller, record.user_id, record.outcome)
        for record in caplog.records
        if record.name == "atelier.audit"
    ]


def admins(server: Server, **identity: object) -> auth_pb2_grpc.AuthServiceStub:
    return auth_pb2_grpc.AuthServiceStub(server.channel(**{"user": "usr_9", "role": "ROLE_ADMIN", **identity}))


async def test_only_an_administrator_may_do_what_is_for_administrators(caplog) -> None:
    caplog.set_level(logging.INFO)
    async with auth_served(Auth()) as server:
        await admins(server).RotateKeys(auth_pb2.RotateKeysRequest())
        with pytest.raises(errors.PermissionDenied) as refused:
            await admins(server, role="ROLE_USER").RotateKeys(auth_pb2.RotateKeysRequest())

    assert (refused.value.reason, refused.value.metadata["role"]) == ("ROLE_REQUIRED", "ROLE_USER")
    assert audited(caplog) == [("RotateKeys", "edge", "usr_9", "OK"), ("RotateKeys", "edge", "usr_9", "ROLE_REQUIRED")]


async def test_whoever_is_refused_is_in_the_audit_too(caplog) -> None:
    caplog.set_level(logging.INFO)
    async with auth_served(Auth()) as server:
        with pytest.raises(errors.PermissionDenied):
            await admins(server, caller="stranger").RotateKeys(auth_pb2.RotateKeysRequest())
        with pytest.raises(errors.Unauthenticated):
            await admins(server, user=None).RotateKeys(auth_pb2.RotateKeysRequest())

    assert audited(caplog) == [
        ("RotateKeys", "stranger", "", "CALLER_NOT_ALLOWED"),
        ("RotateKeys", "edge", "", "TOKEN_MISSING"),
    ]


async def test_a_failure_of_an_audited_call_is_in_the_audit(caplog) -> None:
    caplog.set_level(logging.INFO)
    auth = Auth()
    auth.failure = errors.Unavailable("No keys.")
    async with auth_served(auth) as server:
        with pytest.raises(errors.Unavailable):
            await admins(server).RotateKeys(auth_pb2.RotateKeysRequest())

    assert audited(caplog) == [("RotateKeys", "edge", "usr_9", "UNAVAILABLE")]


async def test_what_is_logged_of_a_failure_belongs_to_the_callers_trace(server, tasks) -> None:
    trace_id, lines = "4bf92f3577b34da6a3ce929d0e0e4736", io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(telemetry.JsonFormatter("task", "task-1"))
    logging.getLogger("mesh.admission").addHandler(handler)

    async def stumble(_):
        raise RuntimeError

    tasks.get = stumble
    async with bare(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetTask(GET, metadata=[*metadata(), ("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01")])
    logging.getLogger("mesh.admission").removeHandler(handler)

    (line,) = lines.getvalue().splitlines()
    assert json.loads(line)["trace_id"] == trace_id


async def test_an_audited_call_that_its_caller_gave_up_is_in_the_audit(caplog) -> None:
    caplog.set_level(logging.INFO)
    auth = Auth()
    auth.wait = True
    async with auth_served(auth) as server:
        call = asyncio.create_task(admins(server).RotateKeys(auth_pb2.RotateKeysRequest()))
        await auth.entered.wait()
        call.cancel()

        await eventually(lambda: audited(caplog) == [("RotateKeys", "edge", "usr_9", "CANCELLED")])


async def test_a_call_that_is_not_audited_leaves_no_line(server, caplog) -> None:
    caplog.set_level(logging.INFO)

    await people(server).GetTask(GET)

    assert audited(caplog) == []


# What is asked for


async def test_bounds_are_refused_before_the_handler(server, tasks) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        await people(server).GetTask(task_pb2.GetTaskRequest())

    assert (refused.value.reason, refused.value.metadata["field"]) == ("TASK_ID_REQUIRED", "taskId")
    assert refused.value.violations == {"taskId": "taskId is required"}
    assert tasks.calls == []


@pytest.mark.parametrize("rpc", ["GetTask", "WatchTask"])
async def test_a_request_that_cannot_be_read_is_refused_in_our_words(server, tasks, rpc) -> None:
    async with server.bare() as plain:
        call = (plain.unary_unary if rpc == "GetTask" else plain.unary_stream)(f"{TASK}/{rpc}")(
            b"\x0a\x01\xff",
            metadata=metadata(),  # a text that is not UTF-8, as of a path with %ff
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (call if rpc == "GetTask" else call.read())

    error = status.from_call(refused.value.code(), refused.value.details(), tuple(refused.value.trailing_metadata()))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "REQUEST_MALFORMED")
    assert "DecodeError" not in error.message
    assert tasks.calls == []


async def test_headers_as_large_as_the_edge_lets_in_reach_the_handler(server, tasks) -> None:
    async with bare(server) as stub:
        await stub.GetTask(GET, metadata=[*metadata(), ("cookie", "x" * 60 * 1024)])

    assert tasks.calls == [GET]


async def test_a_token_is_asked_for_before_the_request_is_looked_at(server) -> None:
    with pytest.raises(errors.Unauthenticated):
        await people(server, user=None).GetTask(task_pb2.GetTaskRequest())


def create(**fields: object) -> task_pb2.CreateTaskRequest:
    return task_pb2.CreateTaskRequest(input_file_id="fil_1", operation={"resize": {"width": 1}}, **fields)


@pytest.mark.parametrize(
    ("request_id", "key", "taken"),
    [("", None, ""), ("a", None, "a"), ("", "b", "b"), ("a", "a", "a"), ("a", "", "a")],
)
async def test_the_idempotency_key_fills_an_empty_request_id(server, request_id, key, taken) -> None:
    extra = {} if key is None else {"idempotency-key": key}

    answer = await people(server, metadata=extra).CreateTask(create(request_id=request_id))

    assert answer.task_id == taken


async def test_a_key_and_another_request_id_are_refused(server, tasks) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        await people(server, metadata={"idempotency-key": "b"}).CreateTask(create(request_id="a"))

    assert refused.value.reason == "REQUEST_ID_AMBIGUOUS"
    assert refused.value.metadata == {"request_id": "a", "idempotency_key": "b"}
    assert tasks.calls == []


async def test_a_key_obeys_the_bounds_of_the_request_id(server) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        await people(server, metadata={"idempotency-key": "k" * 129}).CreateTask(create())

    assert (refused.value.reason, refused.value.metadata["field"]) == ("FIELD_TOO_LONG", "requestId")


# What goes wrong


async def test_a_handlers_error_reaches_the_caller_whole(server, tasks) -> None:
    class TaskNotFound(errors.NotFound):
        reason = "TASK_NOT_FOUND"

    async def missing(request):
        raise TaskNotFound("Gone – 🙂.", metadata={"task_id": "tsk_1"}, retry_after_seconds=2, violations={"a": "b"})

    tasks.get = missing
    with pytest.raises(errors.NotFound) as refused:
        await people(server).GetTask(GET)

    error = refused.value
    assert (error.reason, error.message, error.metadata) == ("TASK_NOT_FOUND", "Gone – 🙂.", {"task_id": "tsk_1"})
    assert (error.retry_after_seconds, error.violations) == (2, {"a": "b"})


async def test_a_refusal_that_quotes_much_still_reaches_the_caller(server, tasks) -> None:
    async def missing(request):
        raise errors.NotFound(f"There is no task {request.task_id}.", metadata={"task_id": request.task_id})

    tasks.get = missing
    with pytest.raises(errors.NotFound) as refused:
        await people(server).GetTask(task_pb2.GetTaskRequest(task_id="🙂" * 50_000))

    assert len(refused.value.metadata["task_id"]) == len(refused.value.message) == status.LONGEST_TEXT


async def test_a_bug_is_logged_and_its_text_kept_from_the_caller(server, tasks, caplog) -> None:
    async def broken(request):
        raise ValueError("password=hunter2")

    tasks.get = broken
    with pytest.raises(errors.Internal) as refused:
        await people(server).GetTask(GET)

    assert "hunter2" not in f"{refused.value} {refused.value.metadata} {refused.value.violations}"
    assert (refused.value.reason, refused.value.metadata) == ("INTERNAL", {"request_id": "req-test"})
    assert "hunter2" in caplog.text
    assert bugs(caplog) == [f"{TASK}/GetTask failed"]


async def test_a_bug_in_a_call_without_an_id_is_told_with_the_one_it_was_given(server, tasks) -> None:
    async def broken(request):
        raise ValueError

    tasks.get = broken
    async with bare(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetTask(GET, metadata=[each for each in metadata() if each[0] != "x-request-id"])

    assert tasks.requests[0].request_id in refused.value.details()


async def test_a_bug_after_the_first_message_of_a_stream_is_told_the_same_way(server, tasks, caplog) -> None:
    async def broken(request):
        yield task_pb2.WatchTaskResponse(cursor="1")
        raise ValueError("password=hunter2")

    tasks.watch = broken
    stream = people(server).WatchTask(WATCH)

    assert (await anext(stream)).cursor == "1"
    with pytest.raises(errors.Internal) as refused:
        await anext(stream)
    assert "hunter2" not in refused.value.message
    assert "hunter2" in caplog.text


async def test_an_error_after_the_first_message_of_a_stream_reaches_the_caller(server, tasks) -> None:
    async def lost(request):
        yield task_pb2.WatchTaskResponse(cursor="1")
        raise errors.Aborted("Lost.", metadata={"why": "test"})

    tasks.watch = lost
    with pytest.raises(errors.Aborted) as refused:
        [each async for each in people(server).WatchTask(WATCH)]

    assert refused.value.metadata == {"why": "test"}


async def test_a_stream_is_refused_as_a_call_is(server, tasks) -> None:
    for identity, request, kind in [
        ({"caller": "stranger"}, WATCH, errors.PermissionDenied),
        ({"user": None}, WATCH, errors.Unauthenticated),
        ({}, task_pb2.WatchTaskRequest(), errors.InvalidArgument),
    ]:
        with pytest.raises(kind):
            await anext(people(server, **identity).WatchTask(request))

    assert tasks.calls == []


async def test_a_stream_that_ends_ends_well(server) -> None:
    assert [each.cursor async for each in people(server).WatchTask(WATCH)] == ["0", "1", "2"]


# Time


async def read_on(stream: grpc.aio.UnaryStreamCall) -> None:
    while await stream.read():
        pass


async def for_ever(request):
    await asyncio.sleep(FAR_AWAY_SECONDS)


async def and_ever(request):
    yield task_pb2.WatchTaskResponse(cursor="1")
    await asyncio.sleep(FAR_AWAY_SECONDS)


async def test_the_policys_deadline_ends_a_call_without_one_of_its_own(tasks, caplog) -> None:
    tasks.get = for_ever
    async with tasks_served(tasks, GetTask=0.1) as server, bare(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetTask(GET, metadata=metadata())
        await asyncio.wait_for(tasks.ended.wait(), 2)

    error = status.from_call(refused.value.code(), "", tuple(refused.value.trailing_metadata()))
    assert isinstance(error, errors.DeadlineExceeded)
    assert error.metadata == {"method": f"{TASK}/GetTask"}
    assert bugs(caplog) == []


async def test_the_policys_deadline_ends_a_stream_too(tasks, caplog) -> None:
    tasks.watch = and_ever
    async with tasks_served(tasks, WatchTask=0.1) as server, bare(server) as stub:
        stream = stub.WatchTask(WATCH, metadata=metadata())
        assert (await stream.read()).cursor == "1"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        await asyncio.wait_for(tasks.ended.wait(), 2)

    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not finish in time" in refused.value.details()
    assert bugs(caplog) == []


async def test_a_stream_whose_reader_is_slow_ends_in_time_too(tasks, caplog) -> None:
    async def flood(request):
        while True:
            yield task_pb2.WatchTaskResponse(cursor="x" * 20_000)

    tasks.watch = flood
    async with tasks_served(tasks, WatchTask=0.2) as server, bare(server) as stub:
        stream = stub.WatchTask(WATCH, metadata=metadata())
        await stream.read()
        await asyncio.wait_for(tasks.ended.wait(), 2)  # nothing is read meanwhile: the server waits in its write
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await read_on(stream)

    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert bugs(caplog) == []


async def test_a_reader_that_takes_nothing_is_dropped_and_told_why(tasks, caplog) -> None:
    sent = 0

    async def flood(request):
        nonlocal sent
        while True:
            sent += 1
            yield task_pb2.WatchTaskResponse(cursor="x" * 1000)

    tasks.watch = flood
    async with tasks_served(tasks, reader_seconds=0.2) as server, server.bare(options=NARROW) as narrow:
        stream = task_pb2_grpc.TaskServiceStub(narrow).WatchTask(WATCH, metadata=metadata())
        await stream.read()
        await asyncio.wait_for(tasks.ended.wait(), 5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await read_on(stream)

    error = status.from_call(refused.value.code(), "", tuple(refused.value.trailing_metadata()))
    assert (error.code, error.reason, error.metadata["seconds"]) == ("ABORTED", "WATCHER_TOO_SLOW", "0.2")
    assert sent < 100  # what waits for a reader is one window, and one message here
    assert bugs(caplog) == []


async def test_the_callers_shorter_deadline_wins(server, tasks, caplog) -> None:
    tasks.get = for_ever

    with pytest.raises(errors.DeadlineExceeded):
        await people(server).GetTask(GET, timeout=0.1)

    await asyncio.wait_for(tasks.ended.wait(), 2)
    assert tasks.requests[0].deadline - asyncio.get_running_loop().time() < 0.1
    assert bugs(caplog) == []


async def test_a_caller_that_leaves_while_it_is_refused_is_no_bug(server, tasks, caplog) -> None:
    tasks.get = for_ever

    async def leaves() -> None:
        with pytest.raises(errors.DeadlineExceeded):
            await people(server).GetTask(GET, timeout=0.05)

    for _ in range(5):
        await asyncio.gather(*[leaves() for _ in range(100)])

    assert bugs(caplog) == []


async def test_two_thousand_who_come_at_once_are_all_answered(server) -> None:
    stub = people(server)

    answers = await asyncio.gather(*[stub.GetTask(GET) for _ in range(2_000)])

    assert {answer.task_id for answer in answers} == {GET.task_id}


async def test_the_callers_longer_deadline_does_not(tasks) -> None:
    tasks.get = for_ever
    async with tasks_served(tasks, GetTask=0.1) as server, bare(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetTask(GET, metadata=metadata(), timeout=FAR_AWAY_SECONDS)

    assert "did not finish in time" in refused.value.details()


async def test_a_timeout_of_the_handlers_own_is_a_bug_and_not_the_callers_deadline(server, tasks, caplog) -> None:
    async def gives_up(request):
        raise TimeoutError("a socket")

    tasks.get = gives_up
    with pytest.raises(errors.Internal):
        await people(server).GetTask(GET)

    assert bugs(caplog) == [f"{TASK}/GetTask failed"]


async def test_a_caller_that_gives_up_ends_the_handler(server, tasks, caplog) -> None:
    tasks.get = for_ever
    call = asyncio.create_task(people(server).GetTask(GET))
    await eventually(lambda: tasks.calls)

    call.cancel()

    await asyncio.wait_for(tasks.ended.wait(), 2)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert bugs(caplog) == []


async def test_leaving_a_stream_early_ends_the_far_side(server, tasks, caplog) -> None:
    tasks.watch = and_ever

    async for _ in people(server).WatchTask(WATCH):
        break

    await asyncio.wait_for(tasks.ended.wait(), 2)
    assert bugs(caplog) == []


async def test_leaving_a_stream_that_waits_for_its_reader_ends_the_far_side_without_a_word(
    server, tasks, caplog
) -> None:
    sent_at = 0.0

    async def flood(request):
        nonlocal sent_at
        while True:
            sent_at = time.monotonic()
            yield task_pb2.WatchTaskResponse(cursor="x" * 20_000)

    def window_is_full() -> bool:
        return time.monotonic() - sent_at > 0.1

    tasks.watch = flood
    async with bare(server) as stub:
        stream = stub.WatchTask(WATCH, metadata=metadata())
        await stream.read()
        await eventually(window_is_full)
        stream.cancel()

        await asyncio.wait_for(tasks.ended.wait(), 2)
    assert bugs(caplog) == []


# Revocation


async def test_a_revoked_token_is_refused_and_other_peoples_are_not(server) -> None:
    server.revoke("gen", "usr_1/1")

    with pytest.raises(errors.Unauthenticated) as refusal:
        await people(server).GetTask(GET)
    assert refusal.value.reason == "TOKEN_REVOKED"
    assert (await people(server, "usr_2").GetTask(GET)).task_id == GET.task_id


async def test_revoking_ends_the_open_streams_of_that_user_only(tasks, caplog) -> None:
    go_on = asyncio.Event()

    async def two(request):
        yield task_pb2.WatchTaskResponse(cursor="1")
        await go_on.wait()
        yield task_pb2.WatchTaskResponse(cursor="2")

    tasks.watch = two
    async with tasks_served(tasks) as server:
        revoked, other = people(server, "usr_1").WatchTask(WATCH), people(server, "usr_2").WatchTask(WATCH)
        await anext(revoked)
        await anext(other)

        server.revoke("gen", "usr_1/1")

        with pytest.raises(errors.Unauthenticated) as ended:
            await anext(revoked)
        go_on.set()
        assert (await anext(other)).cursor == "2"
    assert ended.value.reason == "TOKEN_REVOKED"
    assert bugs(caplog) == []


# Intentions


async def test_an_intention_refuses_its_source_alone_on_connections_that_are_open_and_lets_it_in_when_it_goes(
    server, tasks
) -> None:
    worker = task_pb2_grpc.TaskServiceStub(server.channel(caller="media-worker"))
    await worker.ClaimTask(task_pb2.ClaimTaskRequest(pool="cpu", worker_id="w"))

    server.intend(Intention("media-worker", "storage", 9, allows=False))
    with pytest.raises(errors.PermissionDenied) as refused:
        await worker.ClaimTask(task_pb2.ClaimTaskRequest(pool="cpu", worker_id="w"))
    await people(server).GetTask(GET)
    server.intend()
    await worker.ClaimTask(task_pb2.ClaimTaskRequest(pool="cpu", worker_id="w"))

    assert refused.value.reason == "CALLER_DENIED_BY_INTENTION"
    assert refused.value.metadata == {"caller": "media-worker", "service": "storage"}
    assert len(tasks.calls) == 3


async def test_an_intention_that_allows_lets_nobody_in_whom_the_policy_does_not_name(server, tasks) -> None:
    server.intend(Intention("user", "storage", 9, allows=True))

    with pytest.raises(errors.PermissionDenied) as refused:
        await task_pb2_grpc.TaskServiceStub(server.channel(caller="user")).ClaimTask(
            task_pb2.ClaimTaskRequest(pool="cpu", worker_id="w")
        )

    assert refused.value.reason == "CALLER_NOT_ALLOWED"
    assert tasks.calls == []


async def test_an_intention_ends_the_open_streams_of_its_source_only(tasks, caplog) -> None:
    go_on = asyncio.Event()

    async def two_and_ever(request):
        yield task_pb2.WatchTaskResponse(cursor="1")
        await go_on.wait()
        yield task_pb2.WatchTaskResponse(cursor="2")
        await asyncio.sleep(FAR_AWAY_SECONDS)

    tasks.watch = two_and_ever
    async with tasks_served(tasks) as server:
        stream = people(server).WatchTask(WATCH)
        await anext(stream)

        server.intend(Intention("user", "storage", 9, allows=False))
        go_on.set()
        after_anothers = (await anext(stream)).cursor
        server.intend(Intention("*", "*", 5, allows=False))

        with pytest.raises(errors.PermissionDenied) as ended:
            await anext(stream)
    assert after_anothers == "2"
    assert ended.value.reason == "CALLER_DENIED_BY_INTENTION"
    assert bugs(caplog) == []


# Draining


async def test_draining_ends_open_streams_and_says_to_come_back(tasks, caplog) -> None:
    tasks.watch = and_ever
    async with tasks_served(tasks) as server:
        stream = people(server).WatchTask(WATCH)
        await anext(stream)

        server.admission.end_streams()

        with pytest.raises(errors.Unavailable) as ended:
            await anext(stream)
    assert ended.value.reason == "DRAINING"
    assert bugs(caplog) == []


async def test_draining_leaves_calls_alone(tasks) -> None:
    go_on = asyncio.Event()

    async def wait(request):
        await go_on.wait()
        return task_pb2.Task(task_id="done")

    tasks.get = wait
    async with tasks_served(tasks) as server:
        call = asyncio.create_task(people(server).GetTask(GET))
        await eventually(lambda: tasks.calls)

        server.admission.end_streams()
        go_on.set()

        assert (await call).task_id == "done"


async def test_draining_passes_over_a_stream_that_is_ending_by_itself(tasks) -> None:
    clearing = asyncio.Event()

    async def slow_to_end(request):
        try:
            await asyncio.sleep(FAR_AWAY_SECONDS)
        finally:
            clearing.set()
            await asyncio.sleep(0.2)
        yield

    tasks.watch = slow_to_end
    async with tasks_served(tasks, WatchTask=0.1) as server:
        stream = asyncio.create_task(anext(people(server).WatchTask(WATCH)))
        await clearing.wait()

        server.admission.end_streams()

        with pytest.raises(errors.DeadlineExceeded):
            await stream


# The next hop


@asynccontextmanager
async def two_hops(tasks: Tasks, storage: Storage) -> AsyncIterator[Server]:
    """Serve tasks, whose GetTask asks storage for a file."""
    async with (
        serving(partial(storage_pb2_grpc.add_StorageServiceServicer_to_server, storage)) as far,
        far.bare("task") as plain,
        tasks_served(tasks) as near,
    ):
        files = storage_pb2_grpc.StorageServiceStub(MeshChannel(plain))

        async def ask(request):
            await asyncio.sleep(0.1)  # the time that the first hop's own work takes
            await files.StatFile(storage_pb2.StatFileRequest(file_id="fil_1", user_id="usr_1"))
            return task_pb2.Task()

        tasks.get = ask
        yield near


async def test_the_next_hop_hears_who_calls_for_whom_and_for_which_request(tasks) -> None:
    storage = Storage()
    async with two_hops(tasks, storage) as near:
        await people(near).GetTask(GET)

    assert (storage.request.caller, storage.request.request_id) == ("task", "req-test")
    assert storage.request.metadata["authorization"] == tasks.requests[0].metadata["authorization"]


async def test_the_next_hop_has_no_more_time_than_is_left(tasks) -> None:
    storage = Storage()
    async with two_hops(tasks, storage) as near:
        await people(near).GetTask(GET, timeout=1.5)

    # gRPC rounds what it sends up, to hundredths of these.
    assert 0 < storage.seconds_left < 1.45 < contract.installed().methods[f"{TASK}/GetTask"].deadline_seconds


async def test_the_next_hop_is_ended_when_the_first_caller_gives_up(tasks) -> None:
    storage = Storage()
    storage.wait = True
    async with two_hops(tasks, storage) as near:
        call = asyncio.create_task(people(near).GetTask(GET))
        await storage.entered.wait()
        call.cancel()

        await asyncio.wait_for(storage.ended.wait(), 2)


async def test_a_failure_of_the_next_hop_is_the_same_error_here(tasks) -> None:
    storage = Storage()
    async with two_hops(tasks, storage) as near:
        files = storage_pb2_grpc.StorageServiceStub(near.channel(caller="task"))
        with pytest.raises(errors.Unimplemented):
            await files.StatFile(storage_pb2.StatFileRequest(file_id="fil_1", user_id="usr_1"))


async def test_a_peer_that_is_not_there_is_unavailable() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as plain:
        with pytest.raises(errors.Unavailable) as refused:
            await task_pb2_grpc.TaskServiceStub(MeshChannel(plain)).GetTask(GET)

    error = refused.value
    assert (error.reason, error.metadata, error.retry_after_seconds) == ("SERVICE_UNAVAILABLE", {"service": "task"}, 1)
    assert error.message == "The service task is not there at the moment; try again."  # nothing of sockets


async def test_no_call_begins_when_its_time_is_over(server, tasks) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        await people(server).GetTask(GET, timeout=0.0)

    assert tasks.calls == []


async def test_outside_a_request_a_call_says_nothing() -> None:
    assert channel.outgoing_metadata() == []


# The identity feed


class Feed(identity_pb2_grpc.IdentityServiceServicer):
    """Sends the keys once and ends, as an instance does that stops."""

    def __init__(self) -> None:
        self.watched = 0

    async def WatchIdentity(self, request, _):
        self.watched += 1
        yield identity_pb2.WatchIdentityResponse(jwks=JWKS)


async def test_the_identity_feed_is_followed_though_it_breaks_off() -> None:
    feed, verifier = Feed(), service.Verifier()
    async with serving(partial(identity_pb2_grpc.add_IdentityServiceServicer_to_server, feed)) as server:
        source = service.RemoteIdentityFeed(server.channel(caller="task"))
        follower = asyncio.create_task(verifier.follow(source))

        await eventually(lambda: feed.watched >= 2)

        follower.cancel()
    assert verifier.user(headers("usr_1")["authorization"]).user_id == "usr_1"
