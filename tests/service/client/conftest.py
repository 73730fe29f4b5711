"""A small installation in the test's own process, behind a real Envoy: one port for gRPC and HTTP, as at the edge."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import uvicorn
from atelier.auth.v1 import auth_pb2, auth_pb2_grpc
from atelier.mesh.v1 import topology_pb2, topology_pb2_grpc
from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc, webhook_pb2, webhook_pb2_grpc
from atelier.task.v1.task_pb2 import Task
from atelier.user.v1 import user_pb2, user_pb2_grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mesh import VERSION, errors, status
from tests.eventually import eventually
from tests.ports import free_port

HOST = "127.0.0.1"
FILTERS = "type.googleapis.com/envoy.extensions.filters"
PASSWORD = "correct horse"
RESULT = b"RIFF result"


class Taken(errors.AlreadyExists):
    reason = "USERNAME_TAKEN"


class Wrong(errors.Unauthenticated):
    reason = "CREDENTIALS_INVALID"


class Expired(errors.Unauthenticated):
    reason = "TOKEN_EXPIRED"


class Spent(errors.Unauthenticated):
    reason = "REFRESH_TOKEN_INVALID"


class NoFile(errors.NotFound):
    reason = "FILE_NOT_FOUND"


class NoTask(errors.NotFound):
    reason = "TASK_NOT_FOUND"


class NoWebhook(errors.NotFound):
    reason = "WEBHOOK_NOT_FOUND"


class Full(errors.ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


@dataclass
class Installation(
    auth_pb2_grpc.AuthServiceServicer,
    storage_pb2_grpc.StorageServiceServicer,
    task_pb2_grpc.TaskServiceServicer,
    topology_pb2_grpc.TopologyServiceServicer,
    user_pb2_grpc.UserServiceServicer,
    webhook_pb2_grpc.WebhookServiceServicer,
):
    """What the client meets, and what of it the tests turn."""

    users: dict[str, user_pb2.User] = field(default_factory=dict)
    access_tokens: set[str] = field(default_factory=set)
    refresh_tokens: set[str] = field(default_factory=set)
    issued: int = 0
    token_lifetime: timedelta = timedelta(minutes=5)
    refreshes: int = 0
    files: dict[str, tuple[storage_pb2.File, bytes]] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    request_ids: dict[str, str] = field(default_factory=dict)
    deadlines: dict[str, int] = field(default_factory=dict)
    webhook_urls: dict[str, str] = field(default_factory=dict)
    webhook: webhook_pb2.Webhook | None = None
    held: bool = False
    """Tasks run until they are cancelled."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    failing: bool = False
    break_watch: errors.MeshError | None = None
    """What the next watch breaks with after its first answer."""
    watched_from: list[str] = field(default_factory=list)
    full: bool = False
    reserved: int = 0
    """So many calls are refused for what is about to be given back."""
    ready: bool = True
    upload_pause_seconds: float = 0.0
    bytes_failures: list[errors.MeshError] = field(default_factory=list)
    """What storage refuses the next calls with."""
    url: str = ""

    # Accounts

    async def RegisterUser(self, request, context):
        if request.username in self.users:
            await refuse(context, Taken(f"The username {request.username} is taken."))
        quota = user_pb2.Quota(tasks={"limit": 100, "used": 2}, storage_bytes={"limit": 1 << 30})
        user = user_pb2.User(
            user_id=f"usr_{request.username}", username=request.username, email=request.email,
            role=user_pb2.User.ROLE_USER, status=user_pb2.User.STATUS_ACTIVE, quota=quota,
        )  # fmt: skip
        self.users[request.username] = user
        return user

    async def Login(self, request, context):
        user = self.users.get(request.login)
        if user is None or request.password != PASSWORD:
            await refuse(context, Wrong("Name or password is wrong."))
        tokens = self.tokens()
        return user_pb2.LoginResponse(
            access_token=tokens.access_token, refresh_token=tokens.refresh_token,
            expire_time=tokens.expire_time, user=user,
        )  # fmt: skip

    def tokens(self) -> auth_pb2.Tokens:
        self.issued += 1
        tokens = auth_pb2.Tokens(access_token=f"access-{self.issued}", refresh_token=f"refresh-{self.issued}")
        tokens.expire_time.FromDatetime(datetime.now(UTC) + self.token_lifetime)
        self.access_tokens.add(tokens.access_token)
        self.refresh_tokens.add(tokens.refresh_token)
        return tokens

    async def RefreshTokens(self, request, context):
        self.refreshes += 1
        if request.refresh_token not in self.refresh_tokens:
            await refuse(context, Spent("The refresh token is not valid."))
        self.refresh_tokens.discard(request.refresh_token)
        await asyncio.sleep(0.1)  # long enough for two commands to meet
        return self.tokens()

    async def RevokeSession(self, request, context):
        self.refresh_tokens.discard(request.refresh_token)
        return auth_pb2.RevokeSessionResponse()

    async def RotateKeys(self, request, context):
        await self.require_token(context)
        return auth_pb2.RotateKeysResponse(key_id="key-2")

    async def GetUser(self, request, context):
        await self.require_token(context)
        return next(iter(self.users.values()))

    async def AuditQuotas(self, request, context):
        await self.require_token(context)
        if not self.full:
            return user_pb2.AuditQuotasResponse(reservation_count=3)
        if not request.page_token:
            one, two = {"used": 1}, {"used": 2, "reserved": 1}
            drift = {"user_id": "usr_ada", "metric": "tasks", "period": "2026-11", "counter": two, "ledger": one}
            return user_pb2.AuditQuotasResponse(drifts=[drift], reservation_count=50, next_page_token="2")
        dispute = {"reservation_id": "tsk_1/1", "state": "STATE_BOUND", "wanted_state": "STATE_SETTLED"}
        return user_pb2.AuditQuotasResponse(disputes=[dispute], reservation_count=1)

    async def GetQuota(self, request, context):
        await self.require_token(context)
        return next(iter(self.users.values())).quota

    async def GrantAdmin(self, request, context):
        if request.secret != "installation":
            await refuse(context, errors.PermissionDenied("The secret is wrong."))
        self.users[request.login].role = user_pb2.User.ROLE_ADMIN
        return self.users[request.login]

    async def SetLimits(self, request, context):
        await self.require_token(context)
        return user_pb2.Quota(tasks={"limit": request.tasks if request.HasField("tasks") else 100})

    async def SetRole(self, request, context):
        await self.require_token(context)
        return user_pb2.User(user_id=request.user_id, role=request.role, status=request.status)

    async def GetTopology(self, request, context):
        await self.require_token(context)
        instance = topology_pb2.Instance(
            instance_id="task-1", address="127.0.0.1:9000", version="0.1.0", check_output="connection refused",
            health=topology_pb2.Instance.HEALTH_CRITICAL, agent="here", process="7",
            settings='{"attempts": 3, "log_level": "INFO"}', settings_refusal="attempts: too many",
            degradation="No worker serves the pool cpu; tasks wait.",
        )  # fmt: skip
        held = topology_pb2.Resource(name="task", acknowledged_version="v1", present_version="v2")
        followed = topology_pb2.Subscription(type="ClusterLoadAssignment", acknowledged_version="a", resources=[held])
        service = topology_pb2.Service(name="task", instances=[instance], fault='{"delay_seconds":1}')
        return topology_pb2.GetTopologyResponse(
            services=[service] if request.service in ("", "task") else [],
            clients=[topology_pb2.Client(node_id="user-1", control_plane="control-1", subscriptions=[followed])],
            permissions=[
                topology_pb2.Permission(caller="user", callee="auth", methods=["/a/IssueTokens"], denied=True),
                topology_pb2.Permission(caller="user", callee="task", methods=["/t/LookupTask"]),
            ],
            silent_control_planes=["control-2"],
        )

    def expire_tokens(self) -> None:
        self.access_tokens.clear()

    async def require_token(self, context) -> None:
        header = dict(context.invocation_metadata()).get("authorization", "")
        if header.removeprefix("Bearer ") not in self.access_tokens:
            await refuse(context, Expired("The access token has expired."))

    # Tasks

    async def CreateTask(self, request, context):
        await self.require_token(context)
        if self.full:
            await refuse(context, Full("No tasks left this month.", metadata={"metric": "tasks"}))
        await self.require_room(context)
        task_id = self.request_ids.setdefault(request.request_id, f"tsk_{len(self.tasks) + 1}")
        self.deadlines[task_id] = request.deadline_duration.seconds
        self.webhook_urls[task_id] = request.webhook_url
        task = Task(
            task_id=task_id, state=Task.STATE_QUEUED, input_file_id=request.input_file_id,
            operation=request.operation, progress={"stage": "queued"},
        )  # fmt: skip
        return self.tasks.setdefault(task_id, task)

    async def require_room(self, context) -> None:
        if self.reserved:
            self.reserved -= 1
            await refuse(context, Full("All is reserved.", retry_after_seconds=0.1))

    async def CreateTaskBatch(self, request, context):
        await self.require_token(context)
        await self.require_room(context)
        for item in request.items:
            task_id = f"tsk_{len(self.tasks) + 1}"
            self.tasks[task_id] = Task(
                task_id=task_id, state=Task.STATE_RUNNING, input_file_id=item.input_file_id,
                operation=item.operation, progress={"stage": "process", "fraction": 0.5}, batch_id="bat_1",
            )  # fmt: skip
        return self.batch()

    async def GetTaskBatch(self, request, context):
        await self.require_token(context)
        before = self.batch()
        running = [task for task in self.tasks.values() if task.state == Task.STATE_RUNNING]
        if running and not self.held:  # one ends with each look; of several that fail it is the last
            task = running[0]
            if self.failing and len(running) == 1:
                task.state = Task.STATE_FAILED
                task.error.message, task.error.reason = "The image is damaged.", "INPUT_DAMAGED"
            else:
                task.state = Task.STATE_SUCCEEDED
                self.give_results(task)
        return before

    def give_results(self, task: Task) -> None:
        for _ in task.operation.thumbnails.sizes or [None]:
            task.output_file_ids.append(self.keep("result.webp", "image/webp", RESULT).file_id)

    async def CancelTaskBatch(self, request, context):
        await self.require_token(context)
        for task in self.tasks.values():
            if task.state == Task.STATE_RUNNING:
                task.state = Task.STATE_CANCELLED
        return self.batch()

    def batch(self) -> task_pb2.TaskBatch:
        states = [task.state for task in self.tasks.values() if task.batch_id]
        counts = {Task.State.Name(state).removeprefix("STATE_").lower(): states.count(state) for state in set(states)}
        ended = len(states) - counts.get("running", 0)
        return task_pb2.TaskBatch(
            batch_id="bat_1", task_count=len(states), state_counts=counts, fraction=ended / len(states)
        )

    async def GetTask(self, request, context):
        await self.require_token(context)
        if request.task_id not in self.tasks:
            await refuse(context, NoTask(f"There is no task {request.task_id}."))
        return self.tasks[request.task_id]

    async def ListTasks(self, request, context):
        await self.require_token(context)
        found = [task for task in reversed(self.tasks.values()) if request.state in (0, task.state)]
        found = [task for task in found if request.batch_id in ("", task.batch_id)]
        start = int(request.page_token or 0)
        page = found[start : start + 2]  # small, so that listing has to turn pages
        token = str(start + 2) if start + 2 < len(found) else ""
        return task_pb2.ListTasksResponse(tasks=page, next_page_token=token)

    async def ListTaskEvents(self, request, context):
        number = int(request.page_token or 1)  # one to a page, so that listing has to turn pages
        event = {"sequence": number, "state": Task.STATE_QUEUED if number % 2 else Task.STATE_CANCELLED}
        return task_pb2.ListTaskEventsResponse(events=[event], next_page_token=str(number + 1) if number < 3 else "")

    async def WatchTask(self, request, context):
        await self.require_token(context)
        self.watched_from.append(request.cursor)
        task = self.tasks[request.task_id]
        if not request.cursor:
            yield task_pb2.WatchTaskResponse(task=task, cursor="1")
        if self.break_watch:
            why, self.break_watch = self.break_watch, None
            await refuse(context, why)
        if task.state == Task.STATE_QUEUED:
            task.state = Task.STATE_RUNNING
            task.progress.stage, task.progress.fraction, task.attempt = "process", 0.5, 1
            yield task_pb2.WatchTaskResponse(task=task, cursor="2")
        if self.held and task.state == Task.STATE_RUNNING:
            await self.cancelled.wait()
        if task.state == Task.STATE_RUNNING and self.failing:
            task.state = Task.STATE_FAILED
            task.error.message, task.error.reason = "The image is damaged.", "INPUT_DAMAGED"
        elif task.state == Task.STATE_RUNNING:
            task.state = Task.STATE_SUCCEEDED
            self.give_results(task)
        yield task_pb2.WatchTaskResponse(task=task, cursor="3")

    async def CancelTask(self, request, context):
        await self.require_token(context)
        self.tasks[request.task_id].state = Task.STATE_CANCELLED
        self.cancelled.set()
        return self.tasks[request.task_id]

    async def RetryTask(self, request, context):
        await self.require_room(context)
        self.tasks[request.task_id].state = Task.STATE_QUEUED
        return self.tasks[request.task_id]

    # Webhooks

    async def GetWebhook(self, _request, context):
        await self.require_token(context)
        if self.webhook is None:
            await refuse(context, NoWebhook("You have no webhook yet."))
        return self.webhook

    async def SetWebhook(self, request, context):
        await self.require_token(context)
        self.webhook = webhook_pb2.Webhook(url=request.url, secret="whsec_1")
        return self.webhook

    async def RotateWebhookSecret(self, _request, context):
        return webhook_pb2.Webhook(url=self.webhook.url, secret="whsec_2")

    async def DeleteWebhook(self, _request, context):
        self.webhook.url = ""
        return webhook_pb2.DeleteWebhookResponse()

    async def ListWebhookDeliveries(self, request, context):
        number = int(request.page_token or 3)
        delivery = webhook_pb2.WebhookDelivery(
            delivery_id=f"whd_{number}", task_id=request.task_id or "tsk_9", event_type="atelier.task.v1.TaskFailed",
            state=webhook_pb2.WebhookDelivery.STATE_FAILED, attempts=number, status=410, failure="GONE",
        )  # fmt: skip
        more = str(number - 1) if number > 1 else ""
        return webhook_pb2.ListWebhookDeliveriesResponse(deliveries=[delivery], next_page_token=more)

    async def ResendWebhookDelivery(self, request, context):
        pending = webhook_pb2.WebhookDelivery.STATE_PENDING
        return webhook_pb2.WebhookDelivery(delivery_id=request.delivery_id, state=pending)

    # Administration of tasks

    async def ListDeadLetters(self, request, context):
        await self.require_token(context)
        dead = {"task_id": "tsk_9", "user_id": "usr_ada", "error": {"reason": request.reason or "WORKER_LOST"}}
        return task_pb2.ListDeadLettersResponse(dead_letters=[{**dead, "attempts": 3}])

    async def RedriveTasks(self, request, context):
        await self.require_token(context)
        if request.task_ids:
            refusal = {"task_id": request.task_ids[0], "reason": "QUOTA_EXCEEDED", "message": "All used."}
            return task_pb2.RedriveTasksResponse(refusals=[refusal], task_ids=request.task_ids[1:])
        page = int(request.page_token or 0)
        more = str(page + 1) if page < 2 else ""
        return task_pb2.RedriveTasksResponse(task_ids=[f"tsk_{page}"], next_page_token=more)

    async def ReplayTasks(self, request, context):
        await self.require_token(context)
        if not request.page_token:
            return task_pb2.ReplayTasksResponse(replayed_count=200, next_page_token="2")
        different = [{"task_id": "tsk_8"}, {"task_id": "tsk_9", "fields": ["state", "turn"]}]
        return task_pb2.ReplayTasksResponse(replayed_count=2, incomplete_count=1, discrepancies=different)

    # Files

    def keep(self, name: str, content_type: str, content: bytes) -> storage_pb2.File:
        file_id = f"fil_{len(self.files) + 1}"
        file = storage_pb2.File(file_id=file_id, name=name, content_type=content_type, size_bytes=len(content))
        self.files[file_id] = (file, content)
        return file

    async def GetFile(self, request, context):
        await self.require_token(context)
        if request.file_id not in self.files:
            await refuse(context, NoFile(f"There is no file {request.file_id}."))
        return self.files[request.file_id][0]

    async def ListFiles(self, request, context):
        await self.require_token(context)
        return storage_pb2.ListFilesResponse(files=[file for file, _ in reversed(self.files.values())])

    async def SignFileUrl(self, request, context):
        """Answer with what was asked for."""
        await self.require_token(context)
        return storage_pb2.SignedUrl(url=f"/{request.file_id}/{request.render}/{request.lifetime_duration.seconds}")

    async def DeleteFile(self, request, context):
        if self.files.pop(request.file_id, None) is None:
            await refuse(context, NoFile(f"There is no file {request.file_id}."))
        return storage_pb2.DeleteFileResponse()

    async def upload(self, request: Request) -> Response:
        if refusal := self.refusal(request):
            return refusal
        name = request.query_params["name"]
        if name == "huge.jpg":  # refused before the body is read
            return refused(errors.PayloadTooLarge("The file has too many bytes.", metadata={"max": "10"}))
        content = b""
        async for chunk in request.stream():
            content += chunk
            await asyncio.sleep(self.upload_pause_seconds)
        file = self.keep(name, request.headers["content-type"], content)
        return JSONResponse({"fileId": file.file_id, "name": name, "contentType": file.content_type,
                             "sizeBytes": str(len(content))})  # fmt: skip

    async def download(self, request: Request) -> Response:
        if refusal := self.refusal(request):
            return refusal
        found = self.files.get(request.path_params["file_id"])
        if found is None:
            return refused(NoFile("There is no such file."))
        return Response(found[1], media_type=found[0].content_type)

    async def render(self, request: Request) -> Response:
        """Answer with what was asked for."""
        return self.refusal(request) or Response(request.url.query.encode())

    def refusal(self, request: Request) -> Response | None:
        if self.bytes_failures:
            return refused(self.bytes_failures.pop())
        known = request.headers.get("authorization", "").removeprefix("Bearer ") in self.access_tokens
        return None if known else refused(Expired("The access token has expired."))

    async def readyz(self, _request: Request) -> Response:
        if self.ready:
            return JSONResponse({"status": "ready"})
        return refused(errors.Unavailable("Not ready: waiting for media.", metadata={"missing": "media"}))

    def application(self) -> Starlette:
        async def alive(_request: Request) -> Response:
            return JSONResponse({"status": "alive"})

        async def version(_request: Request) -> Response:
            return JSONResponse({"version": VERSION})

        return Starlette(
            routes=[
                Route("/healthz", alive),
                Route("/readyz", self.readyz),
                Route("/api/v1/version", version),
                Route("/api/v1/files", self.upload, methods=["POST"]),
                Route("/api/v1/files/{file_id}/content", self.download),
                Route("/api/v1/files/{file_id}/render", self.render),
            ]
        )


async def refuse(context, error: errors.MeshError) -> None:
    await context.abort(status.GRPC_CODES[error.code_number], error.message, status.to_trailers(error))


def refused(error: errors.MeshError) -> Response:
    return JSONResponse(status.to_json(error), error.http_status, {"x-request-id": "req-1"})


def envoy_config(port: int, grpc_port: int, http_port: int) -> dict[str, object]:
    def cluster(name: str, to: int) -> dict[str, object]:
        address = {"socket_address": {"address": HOST, "port_value": to}}
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
        found: dict[str, object] = {
            "name": name,
            "type": "STATIC",
            "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        }
        if name == "grpc":
            found["typed_extension_protocol_options"] = {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}},
                }
            }
        return found

    routes = [
        {"match": {"prefix": "/", "grpc": {}}, "route": {"cluster": "grpc", "timeout": "0s"}},
        {"match": {"prefix": "/"}, "route": {"cluster": "http"}},
    ]
    manager = {
        "@type": f"{FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "edge",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{FILTERS}.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "name": "edge",
        "address": {"socket_address": {"address": HOST, "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    clusters = [cluster("grpc", grpc_port), cluster("http", http_port)]
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


@asynccontextmanager
async def envoy(folder: Path, grpc_port: int, http_port: int) -> AsyncIterator[str]:
    port = free_port()
    path, log = folder / "envoy.json", folder / "envoy.log"
    path.write_text(json.dumps(envoy_config(port, grpc_port, http_port)))
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "envoy"), "-c", str(path),
            "--disable-hot-restart", "--concurrency", "1", "-l", "warning",
            stdout=output, stderr=output,
        )  # fmt: skip

    async def answers() -> bool:
        assert process.returncode is None, log.read_text()
        _, writer = await asyncio.open_connection(HOST, port)
        writer.close()
        return True

    try:
        await eventually(answers, within_seconds=20)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def http_server(installation: Installation) -> AsyncIterator[int]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        server = uvicorn.Server(uvicorn.Config(installation.application(), log_level="warning", lifespan="off"))
        server.install_signal_handlers = lambda: None  # not a process of its own
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = server.force_exit = True
            await serving


@dataclass
class Person:
    """Somebody with a terminal of their own, but no TTY."""

    url: str
    folder: Path

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "atelier_client.command", *arguments,
            cwd=self.folder, env=self.environment(),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        dropped = ("ATELIER_", "XDG_CONFIG_HOME")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        return {**kept, "ATELIER_SERVER": self.url, "XDG_CONFIG_HOME": str(self.folder / "config")}

    async def types(self, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
        """Return exit code, standard output and standard error."""
        process = await self.start(*arguments)
        out, err = await process.communicate(stdin)
        return process.returncode or 0, out, err.decode()

    async def registers(self) -> None:
        code, _, err = await self.types(
            "register", "--username", "ada", "--email", "ada@example.org", "--password-stdin",
            stdin=f"{PASSWORD}\n".encode(),
        )  # fmt: skip
        assert code == 0, err

    @staticmethod
    def interrupt(process: asyncio.subprocess.Process) -> None:
        process.send_signal(signal.SIGINT)


@pytest.fixture
async def installation(tmp_path: Path) -> AsyncIterator[Installation]:
    installation = Installation()
    server = grpc.aio.server()
    auth_pb2_grpc.add_AuthServiceServicer_to_server(installation, server)
    topology_pb2_grpc.add_TopologyServiceServicer_to_server(installation, server)
    storage_pb2_grpc.add_StorageServiceServicer_to_server(installation, server)
    task_pb2_grpc.add_TaskServiceServicer_to_server(installation, server)
    user_pb2_grpc.add_UserServiceServicer_to_server(installation, server)
    webhook_pb2_grpc.add_WebhookServiceServicer_to_server(installation, server)
    grpc_port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    folder = tmp_path / "installation"
    folder.mkdir()
    async with http_server(installation) as http_port, envoy(folder, grpc_port, http_port) as url:
        installation.url = url
        yield installation
    await server.stop(None)


@pytest.fixture
def person(installation: Installation, tmp_path: Path) -> Person:
    folder = tmp_path / "home"
    folder.mkdir()
    return Person(installation.url, folder)
