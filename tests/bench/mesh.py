"""One call through the mesh against the same handler on bare grpc.aio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import grpc
from atelier.mesh.v1 import identity_pb2
from atelier.user.v1 import user_pb2, user_pb2_grpc

from mesh import certificates, channel, service
from mesh.config import ServiceConfig
from scripts.local.layout import BIN, Layout, mesh_environment
from tests.bench.report import Figures, arguments, tell
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.mesh_server import JWKS

CALLERS = 32  # at once, for throughput
SECONDS = 4.0  # of throughput, a round
LATENCIES = 400  # one at a time, for latency, a round

HOW = (
    "Server and client are a process each. Bare: a grpc.aio server and a channel straight to it, without interceptors, "
    "with certificates on both sides or in clear. Mesh: the same handler under mesh.service, found through Consul and "
    "the control plane, called by mesh.channel over xDS, with certificates on both sides, deadline, policy, "
    "bounds and trace context. The call is one that services make of each other."
)


class Users(user_pb2_grpc.UserServiceServicer):
    """Answers at once, so that only the way there and back is measured."""

    async def GetAccount(self, request, context):
        return user_pb2.Account(user_id=request.user_id, role=user_pb2.User.ROLE_USER)


class _Config(ServiceConfig):
    service = "user"


class _Caller(ServiceConfig):
    service = "task"


class _Keys:
    async def watch(self):
        # The key was made by the process that calls.
        yield identity_pb2.WatchIdentityResponse(jwks=os.environ["BENCH_JWKS"])
        await asyncio.Event().wait()


async def serve_bare() -> None:
    server = grpc.aio.server()
    user_pb2_grpc.add_UserServiceServicer_to_server(Users(), server)
    config = _Config()
    shown = config.secret("ads.key").encode(), config.secret("ads.pem").encode()  # they name an address
    async with certificates.kept(config) as leaf:
        ports = server.add_secure_port("127.0.0.1:0", leaf.grpc_server(shown)), server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(*ports, flush=True)
        await server.wait_for_termination()


async def serve_mesh() -> None:
    config, register = _Config(), partial(user_pb2_grpc.add_UserServiceServicer_to_server, Users())
    async with certificates.kept(config) as leaf:
        await service.serve(config, leaf, register, identity=_Keys())


async def throughput(stub: user_pb2_grpc.UserServiceStub) -> float:
    """Return calls a second of CALLERS callers."""
    request = user_pb2.GetAccountRequest(user_id="usr_1")
    end = time.perf_counter() + SECONDS

    async def caller() -> int:
        calls = 0
        while time.perf_counter() < end:
            await stub.GetAccount(request)
            calls += 1
        return calls

    began = time.perf_counter()
    calls = sum(await asyncio.gather(*(caller() for _ in range(CALLERS))))
    return calls / (time.perf_counter() - began)


async def median_ms(stub: user_pb2_grpc.UserServiceStub) -> float:
    """Return the median latency of one caller, ms."""
    request = user_pb2.GetAccountRequest(user_id="usr_1")
    taken = []
    for _ in range(LATENCIES):
        began = time.perf_counter()
        await stub.GetAccount(request)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2] * 1000


async def measure(mesh: Mesh, rounds: int) -> list[Figures]:
    layout = Layout.from_environment(mesh.environment)
    environment = {
        **os.environ,
        **mesh_environment(layout, {}, mesh.secret("broker")),
        "ATELIER_INSTANCE": "user-bench",
        "BENCH_JWKS": JWKS,
    }
    os.environ.update({**environment, "ATELIER_INSTANCE": "task-bench"})
    # The real user service makes room: every call goes to the stand-in.
    subprocess.run([BIN / "supervisorctl", "-s", f"unix://{layout.socket}", "stop", "user-1"], check=True, stdout=2)
    command = [sys.executable, "-c", "import asyncio; from tests.bench import mesh; asyncio.run(mesh.{}())"]
    ours = subprocess.Popen([*command[:2], command[2].format("serve_mesh")], env=environment, stderr=subprocess.DEVNULL)
    environment["ATELIER_INSTANCE"] = "user-bare"
    theirs = subprocess.Popen(
        [*command[:2], command[2].format("serve_bare")], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert theirs.stdout
    figured = [Figures("bare grpc.aio, mTLS"), Figures("bare grpc.aio, in clear"), Figures("mesh call")]
    config = _Caller()
    try:
        async with AsyncExitStack() as stack:
            hold = stack.enter_async_context
            leaf = await hold(certificates.kept(config))
            secure, plain = (f"127.0.0.1:{port}" for port in theirs.stdout.readline().split())
            own = leaf.present
            trusted = grpc.ssl_channel_credentials(config.secret("ads-ca.pem").encode(), own.key, own.certificate)
            channels = [
                await hold(grpc.aio.secure_channel(secure, trusted)),
                await hold(grpc.aio.insecure_channel(plain)),
                await hold(channel.opened("user", config, leaf)),
            ]
            stubs = [user_pb2_grpc.UserServiceStub(each) for each in channels]
            await eventually(
                lambda: stubs[2].GetAccount(user_pb2.GetAccountRequest(user_id="usr_1")), within_seconds=30
            )
            for _ in range(rounds):
                for figures, stub in zip(figured, stubs, strict=True):
                    figures.add(throughput=await throughput(stub), median_latency=await median_ms(stub))
    finally:
        for process in (ours, theirs):
            process.terminate()
            process.wait()
    return figured


def main() -> None:
    options = arguments(__doc__ or "", rounds=5)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "var") as mesh,
    ):
        bare, clear, through = asyncio.run(measure(mesh, options.rounds))
    tell(
        "A call through the mesh",
        HOW,
        [bare, clear, through],
        {"throughput": "calls/s", "median_latency": "ms"},
        {
            "bare_grpc": through.median("throughput") / bare.median("throughput"),
            "bare_grpc_in_clear": through.median("throughput") / clear.median("throughput"),
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
