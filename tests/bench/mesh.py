"""One call through the mesh against the same handler on bare grpc.aio, and under nameko."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

import grpc
import psutil
from atelier.mesh.v1 import identity_pb2
from atelier.user.v1 import user_pb2, user_pb2_grpc

from mesh import certificates, channel, service
from mesh.config import ServiceConfig
from scripts.local.layout import BIN, Layout, mesh_environment
from tests.bench.peers import python_with
from tests.bench.report import Figures, arguments, tell
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.mesh_server import JWKS

CALLERS = 32  # at once, for throughput
SECONDS = 2.0  # of throughput, a round; short, so that rounds compare what the machine did at the same time
LATENCIES = 300  # one at a time, for latency, a round

NAMEKO_SECONDS, NAMEKO_TRIES = 20, 5  # now and then a caller finds its replies lost, and waits for ever
NAMEKO_PEER = Path(__file__).with_name("nameko_peer.py")

HOW = (
    f"Server and caller are a process each; {CALLERS} calls at a time for throughput and for processor time (of both "
    "processes, a call), one at a time for latency. Bare: a grpc.aio server and a channel straight to it, without "
    "interceptors, with certificates on both sides or in clear, on asyncio's own loop. Mesh: the same handler under "
    "mesh.service, found through Consul and the control plane, called by mesh.channel over xDS, with certificates on "
    "both sides, deadline, policy, bounds and trace context, on uvloop, as services run. nameko: the same answer by "
    "its rpc over the mesh's RabbitMQ, in JSON and in clear; the broker's processor time is not counted. The call is "
    "one that services make of each other."
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
        print("begins", flush=True)
        await service.serve(config, leaf, register, identity=_Keys())


async def call_bare(server: str, address: str) -> None:
    config = _Caller()
    async with certificates.kept(config) as leaf:
        own = leaf.present
        trusted = grpc.ssl_channel_credentials(config.secret("ads-ca.pem").encode(), own.key, own.certificate)
        async with grpc.aio.secure_channel(address, trusted) as opened:
            await call_when_told(opened, server)


async def call_in_clear(server: str, address: str) -> None:
    async with grpc.aio.insecure_channel(address) as opened:
        await call_when_told(opened, server)


async def call_mesh(server: str) -> None:
    config = _Caller()
    async with certificates.kept(config) as leaf, channel.opened("user", config, leaf) as opened:
        await call_when_told(opened, server)


async def call_when_told(opened: grpc.aio.Channel, server: str) -> None:
    """Write a round's measures for each line that is read; `server` is a process id."""
    stub = user_pb2_grpc.UserServiceStub(opened)
    await eventually(lambda: stub.GetAccount(user_pb2.GetAccountRequest(user_id="usr_1")), within_seconds=30)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await called(stub, psutil.Process(int(server)))), flush=True)


async def called(stub: user_pb2_grpc.UserServiceStub, server: psutil.Process) -> dict[str, float]:
    """Return one round's measures of calls to `server`."""
    request = user_pb2.GetAccountRequest(user_id="usr_1")
    used = time.process_time() + used_by(server)
    began = time.perf_counter()
    end = began + SECONDS

    async def caller() -> int:
        calls = 0
        while time.perf_counter() < end:
            await stub.GetAccount(request)
            calls += 1
        return calls

    calls = sum(await asyncio.gather(*(caller() for _ in range(CALLERS))))
    throughput = calls / (time.perf_counter() - began)
    used = time.process_time() + used_by(server) - used
    taken = []
    for _ in range(LATENCIES):
        began = time.perf_counter()
        await stub.GetAccount(request)
        taken.append(time.perf_counter() - began)
    return {
        "throughput": throughput,
        "processor_time": used / calls * 1e6,
        "median_latency": sorted(taken)[len(taken) // 2] * 1000,
    }


def called_by_nameko(python: Path, url: str, server: psutil.Process) -> dict[str, float]:
    """Return one round's measures of nameko's calls to `server`."""
    command = [python, NAMEKO_PEER, "call", url, *(str(each) for each in (CALLERS, SECONDS, LATENCIES))]
    for tries in reversed(range(NAMEKO_TRIES)):
        used = used_by(server)
        try:
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=NAMEKO_SECONDS
            )
        except subprocess.TimeoutExpired:
            if not tries:
                raise
        else:
            break
    answer = json.loads(done.stdout)
    # The server's time for the calls one at a time is in it, too, and they are in the number.
    calls = answer["calls"] + LATENCIES
    used_for_one = answer["caller_seconds"] / answer["calls"] + (used_by(server) - used) / calls
    return {
        "throughput": answer["throughput"],
        "processor_time": used_for_one * 1e6,
        "median_latency": answer["median_latency"],
    }


def used_by(process: psutil.Process) -> float:
    """Return the processor time that a process has used, seconds."""
    times = process.cpu_times()
    return times.user + times.system


class Program:
    """A server or a caller of its own process, which says one line when it is there."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self._process.pid

    def said(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def round(self) -> dict[str, float]:
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        measures: dict[str, float] = json.loads(self.said())
        return measures

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()


def measure(mesh: Mesh, rounds: int) -> list[Figures]:
    layout = Layout.from_environment(mesh.environment)
    environment = {
        **os.environ,
        **mesh_environment(layout, {}, mesh.secret("broker")),
        "BENCH_JWKS": JWKS,
    }
    # The real user service makes room: every call goes to the stand-in.
    subprocess.run([BIN / "supervisorctl", "-s", f"unix://{layout.socket}", "stop", "user-1"], check=True, stdout=2)
    python, url = python_with("nameko"), environment["ATELIER_BROKER_URL"]
    figured = [
        Figures("bare grpc.aio, mTLS"), Figures("bare grpc.aio, in clear"), Figures("mesh call"), Figures("nameko rpc"),
    ]  # fmt: skip
    with ExitStack() as stack:

        def ours(instance: str, loop: str, function: str, *given: str) -> Program:
            code = f"import sys, {loop}; from tests.bench import mesh; {loop}.run(mesh.{function}(*sys.argv[1:]))"
            command = [sys.executable, "-c", code, *given]
            return stack.enter_context(Program(command, {**environment, "ATELIER_INSTANCE": instance}))

        bare = ours("user-bare", "asyncio", "serve_bare")
        secure, plain = (f"127.0.0.1:{port}" for port in bare.said().split())
        served = ours("user-bench", "uvloop", "serve_mesh")
        theirs = stack.enter_context(Program([python, NAMEKO_PEER, "serve", url], environment))
        served.said()
        theirs.said()
        callers = [
            ours("task-bare", "asyncio", "call_bare", str(bare.pid), secure),
            ours("task-clear", "asyncio", "call_in_clear", str(bare.pid), plain),
            ours("task-bench", "uvloop", "call_mesh", str(served.pid)),
        ]
        for _ in range(rounds):
            found = [caller.round() for caller in callers]
            found.append(called_by_nameko(python, url, psutil.Process(theirs.pid)))
            for figures, measures in zip(figured, found, strict=True):
                figures.add(**measures)
    return figured


def main() -> None:
    options = arguments(__doc__ or "", rounds=9)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "var") as mesh,
    ):
        bare, clear, through, theirs = measure(mesh, options.rounds)
    tell(
        "A call through the mesh",
        HOW,
        [bare, clear, through, theirs],
        {"throughput": "calls/s", "processor_time": "µs", "median_latency": "ms"},
        {
            "bare_grpc": through.ratios("throughput", bare),
            "bare_grpc_in_clear": through.ratios("throughput", clear),
            "nameko": through.ratios("throughput", theirs),
            "bare_grpc, by processor time": bare.ratios("processor_time", through),
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
