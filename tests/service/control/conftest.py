"""A real Envoy under the control plane's ADS server, before stub services that remember what reached them."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import httpx
import jwt
import pytest
import pytest_asyncio
import uvicorn
from atelier.task.v1 import task_pb2, task_pb2_grpc
from atelier.user.v1 import user_pb2, user_pb2_grpc
from cryptography.hazmat.primitives.asymmetric import ec
from envoy.service.discovery.v3 import ads_pb2_grpc
from google.api import httpbody_pb2
from jwt.algorithms import ECAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mesh import contract as contracts
from mesh import status
from mesh.certificates import Leaf
from mesh.contract import Contract
from mesh.control import edge, snapshot
from mesh.control.catalog import Instance
from mesh.control.edge import Rate, Settings
from mesh.control.known import Known
from mesh.control.server import DiscoveryService, Publisher
from mesh.errors import NotFound
from tests.authority import envoy_tls, leaf
from tests.eventually import eventually
from tests.ports import free_port

HOST = "127.0.0.1"
ENVOY = shutil.which("envoy") or str(Path(sys.executable).parent / "envoy")
RATES = {"READ": Rate(1000, 1000), "WRITE": Rate(1, 3), "SIGN_IN": Rate(1, 3), "BYTES": Rate(1000, 1000)}


class Keys:
    """Signs tokens as auth does."""

    def __init__(self, kid: str = "k1") -> None:
        self._kid = kid
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.jwks = json.dumps(
            {"keys": [{**json.loads(ECAlgorithm.to_jwk(self._key.public_key())), "kid": kid, "alg": "ES256"}]}
        )

    def token(self, user: str = "usr_1", role: str = "ROLE_USER", lives_seconds: float = 300, **claims: object) -> str:
        now = time.time()
        payload = {
            "iss": "atelier", "aud": "atelier", "sub": user, "jti": "jti_1", "sid": "ses_1",
            "gen": f"{user}/1", "role": role, "iat": int(now), "exp": int(now + lives_seconds), **claims,
        }  # fmt: skip
        return jwt.encode(payload, self._key, algorithm="ES256", headers={"kid": self._kid})

    def bearer(self, user: str = "usr_1", **claims: object) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token(user, **claims)}"}


class StubTasks(task_pb2_grpc.TaskServiceServicer):
    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.calls = 0
        self.waits: list[float] = []
        self.continued = asyncio.Event()
        self.flooded_at = 0.0

    def _note(self, context) -> None:
        self.calls += 1
        self.metadata = dict(context.invocation_metadata())

    async def GetTask(self, request, context):
        self._note(context)
        self.waits.append(request.wait.ToTimedelta().total_seconds())
        if request.task_id == "tsk_slow":
            await asyncio.sleep(30)
        if request.task_id == "tsk_missing":
            error = NotFound("There is no task tsk_missing.", metadata={"task_id": request.task_id})
            error.reason = "TASK_NOT_FOUND"
            await context.abort(grpc.StatusCode.NOT_FOUND, error.message, status.to_trailers(error))
        if request.task_id == "tsk_flaky" and self.calls < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return task_pb2.Task(task_id=request.task_id, state=task_pb2.Task.STATE_QUEUED)

    async def ListTasks(self, request, context):
        self._note(context)
        return task_pb2.ListTasksResponse(tasks=[task_pb2.Task(task_id=f"tsk_{n}") for n in range(request.page_size)])

    async def CreateTask(self, request, context):
        self._note(context)
        return task_pb2.Task(task_id="tsk_new")

    async def RetryTask(self, request, context):
        self._note(context)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    async def CancelTask(self, request, context):
        self._note(context)
        return task_pb2.Task(task_id=request.task_id)

    async def WatchTaskEvents(self, request, context):
        self._note(context)
        while request.task_id == "tsk_flood":
            self.flooded_at = time.monotonic()
            yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=b"data: " + 20_000 * b"x" + b"\n\n")
        yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=b"id: 1\ndata: {}\n\n")
        await self.continued.wait()
        yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=b": still here\n\n")


class StubUsers(user_pb2_grpc.UserServiceServicer):
    async def Login(self, request, context):
        return user_pb2.LoginResponse(access_token="ey")

    async def SetRole(self, request, context):
        return user_pb2.User(user_id=request.user_id)


async def echo(request: Request) -> JSONResponse:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
    return JSONResponse({"path": request.url.path, "bytes": size, "headers": dict(request.headers)}, status_code=201)


@asynccontextmanager
async def served(*adds, name: str = "control") -> AsyncIterator[int]:
    server = grpc.aio.server()
    for add, servicer in adds:
        add(servicer, server)
    port = server.add_secure_port(f"{HOST}:0", leaf(name).grpc_server())
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@asynccontextmanager
async def http_served() -> AsyncIterator[int]:
    listener = socket.socket()
    listener.bind((HOST, 0))
    config = uvicorn.Config(Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])]), log_level="error")
    config.load()
    config.ssl = leaf("storage").tls_server()
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def envoy_running(
    folder: Path, *control_ports: int, own: Leaf | None = None, authority: Path | None = None, zone: str = ""
) -> AsyncIterator[Path]:
    """Run Envoy against ADS servers; yields its log."""
    h2 = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": HOST, "port_value": port}}}} for port in control_ports
    ]
    bootstrap = {
        "node": {"id": "edge-1", "cluster": "edge", "locality": {"zone": zone}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "control"}}],
            },
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "control",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": h2,
                    "transport_socket": envoy_tls(own or leaf("edge"), folder, authority),
                    "load_assignment": {"cluster_name": "control", "endpoints": [{"lb_endpoints": endpoints}]},
                }
            ]
        },
    }
    path, log = folder / "envoy.json", folder / "envoy.log"
    path.write_text(json.dumps(bootstrap))
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            ENVOY, "-c", str(path), "--disable-hot-restart", "--concurrency", "1", "-l", "warning",
            stdout=output, stderr=output,
        )  # fmt: skip
        try:
            yield log
        finally:
            process.terminate()
            await process.wait()


@dataclass
class Edge:
    """The edge under test and what stands around it."""

    publisher: Publisher
    port: int
    keys: Keys
    tasks: StubTasks
    log: Path
    known: Known
    contract: Contract
    settings: Settings
    client: httpx.AsyncClient
    revision: int = 0

    async def publish(self, known: Known | None = None, settings: Settings | None = None) -> None:
        """Compile, send and wait until Envoy has it; without arguments, the state in which all is well."""
        known = known or self.known
        self.revision += 1
        document = json.dumps({"openapi": "3.1.0", "padding": "x" * 500_000, "revision": self.revision})
        self.publisher.publish(
            edge=edge.envoy(
                self.contract,
                contracts.IMAGE.read_bytes(),
                known,
                replace(settings or self.settings, openapi=document),
                leaf("edge").spiffe_id,
            ),
            clients=snapshot.grpc_clients(known.catalog, self.contract, leaf("edge").spiffe_id),
        )

        async def taken() -> bool:
            try:
                return (await self.client.get("/openapi.json")).json()["revision"] == self.revision
            except httpx.TransportError:
                return False

        try:
            await eventually(taken, within_seconds=15)
        except AssertionError:
            pytest.fail(self.log.read_text())

    async def refused(self, answer: httpx.Response, status: int, reason: str) -> dict:
        """Check that an answer is a refusal in the one agreed shape, and return it."""
        assert answer.headers["content-type"] == "application/json", answer.text
        body = answer.json()
        assert (answer.status_code, body["details"][0]["reason"]) == (status, reason), body
        assert body["details"][0]["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
        assert body["details"][0]["domain"] == "atelier"
        assert isinstance(body["code"], int)
        assert body["message"]
        assert answer.headers["x-request-id"]
        return body


def shortened(contract: Contract, **seconds: float) -> Contract:
    """Return the contract with other deadlines for some rpcs, by the rpc's last name."""
    return Contract(
        {
            name: replace(method, deadline_seconds=seconds.get(name.rpartition("/")[2], method.deadline_seconds))
            for name, method in contract.methods.items()
        }
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    async with AsyncExitStack() as stack:
        tasks, keys, publisher = StubTasks(), Keys(), Publisher()
        task_port = await stack.enter_async_context(
            served((task_pb2_grpc.add_TaskServiceServicer_to_server, tasks), name="task")
        )
        user_port = await stack.enter_async_context(
            served((user_pb2_grpc.add_UserServiceServicer_to_server, StubUsers()), name="user")
        )
        http_port = await stack.enter_async_context(http_served())
        control_port = await stack.enter_async_context(
            served(
                (
                    ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server,
                    DiscoveryService(publisher, leaf("control").caller),
                )
            )
        )
        known = Known(
            {
                "task": (Instance(HOST, task_port),),
                "user": (Instance(HOST, user_port),),
                "storage-http": (Instance(HOST, http_port),),
            },
            keys.jwks,
        )
        folder = tmp_path_factory.mktemp("envoy")
        settings = Settings(HOST, free_port(), (), RATES, None, str(folder))
        log = await stack.enter_async_context(envoy_running(folder, control_port))
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{HOST}:{settings.port}", timeout=10)
        )
        contract = shortened(contracts.installed(), GetTask=1)
        made = Edge(publisher, settings.port, keys, tasks, log, known, contract, settings, client)
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def at_edge(running: Edge) -> Edge:
    """The running edge, as if nobody had called yet."""
    await running.publish()
    running.tasks.calls = 0
    running.tasks.metadata = {}
    return running
