"""Runs a service: gRPC, HTTP and health listeners, registration, background work, and an orderly end.

Every rpc passes, outside in: telemetry, errors, deadline, identity and policy, bounds, handler.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mesh import admin, admission, bounds, channel, contract, discovery, status, telemetry
from mesh import http as http_listener
from mesh.certificates import Leaf
from mesh.config import ServiceConfig
from mesh.context import Request
from mesh.contract import Contract, Method
from mesh.discovery import Registration
from mesh.errors import Cancelled, InvalidArgument, MeshError, Unauthenticated, Unavailable
from mesh.identity import IdentityFeed, RemoteIdentityFeed, Verifier
from mesh.live import Live

Register = Callable[[grpc.aio.Server], None]
Dependency = Callable[[], Awaitable[object]]
Background = Callable[[], Awaitable[None]]

HEALTH_PERIOD_SECONDS = 1.0
DEPENDENCY_SECONDS = 2.0  # longer, and the dependency counts as away
PROPAGATION_SECONDS = 1.0  # from deregistration until every client has heard of it
OPTIONS = [
    ("grpc.so_reuseport", 0),  # two instances on one port would be a mistake, not a feature
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients ping every 30 s (mesh.channel)
    ("grpc.keepalive_permit_without_calls", 1),
    # Above the 60 KiB that the edge lets in, cookies of other pages among them: gRPC's 8 KiB would be refused as 429.
    ("grpc.max_metadata_size", 80 * 1024),
    ("grpc.absolute_max_metadata_size", 96 * 1024),
]

log = logging.getLogger(__name__)


class RequestIdAmbiguous(InvalidArgument):
    reason = "REQUEST_ID_AMBIGUOUS"


class RequestMalformed(InvalidArgument):
    reason = "REQUEST_MALFORMED"


class Draining(Unavailable):
    reason = "DRAINING"


class Admission(grpc.aio.ServerInterceptor):
    """Wraps each handler, once, in everything that the contract asks of it.

    Args:
        verifier: of people's tokens.
        rpcs: the policies.
        leaf: our certificate; callers must be of the same mesh.
        beside: full names of rpcs that are no contract of ours and admit callers themselves.
    """

    def __init__(self, verifier: Verifier, rpcs: Contract, leaf: Leaf, beside: Collection[str] = ()) -> None:
        self._beside = beside
        self._verifier = verifier
        self._leaf = leaf
        self._rpcs = rpcs
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._streams: dict[asyncio.Timeout, Request] = {}
        self._draining = asyncio.Event()
        verifier.on_revocation = self.end_revoked_streams

    def end_streams(self) -> None:
        """End every open stream with UNAVAILABLE: some last for hours, and their clients resume elsewhere.

        Calls that only wait answer now what they have.
        """
        self._draining.set()
        for deadline, request in self._streams.items():
            _end(deadline, request, Draining("This instance stops; resume at another."))

    def end_revoked_streams(self) -> None:
        """End the open streams of people whose token has been revoked since they began."""
        for deadline, request in self._streams.items():
            if request.user:
                try:
                    self._verifier.require_unrevoked(request.user)
                except Unauthenticated as error:
                    _end(deadline, request, error)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        name = handler_call_details.method
        wrapped = self._handlers.get(name)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            method = self._rpcs.methods.get(name)
            if handler is None or method is None:
                return handler if name in self._beside else None  # without a policy it is nobody's to call
            wrapped = self._handlers[name] = self._wrapped(handler, method)
        return wrapped

    def _wrapped(self, handler: Any, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method, handler.request_deserializer),
                None,
                handler.response_serializer,
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method, handler.request_deserializer),
                None,
                handler.response_serializer,
            )
        raise TypeError(f"{method.full_name}: requests that stream are served over HTTP")

    # Requests are read here and not by gRPC, which would tell the caller of Python's exceptions.
    def _unary(self, inner: Any, method: Method, read: Callable[[bytes], Any]) -> Any:
        async def serve_unary(body: bytes, call: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._served(method, body, read, call) as message:
                return await inner(message, call)

        return serve_unary

    def _stream(self, inner: Any, method: Method, read: Callable[[bytes], Any]) -> Any:
        # Writes instead of yielding: what ends it while its reader is slow is then raised here, not in grpc.
        async def serve_stream(body: bytes, call: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with self._served(method, body, read, call) as message, aclosing(inner(message, call)) as responses:
                async for response in responses:
                    try:
                        await call.write(response)
                    except grpc.aio.InternalError:
                        raise asyncio.CancelledError from None  # nobody reads on; gRPC is about to say the same

        return serve_stream

    @asynccontextmanager
    async def _served(
        self, method: Method, body: bytes, read: Callable[[bytes], Any], call: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        """Hold one call: let it in, end it in time, and tell its failure to the caller, the log and the audit.

        Yields the request that `read` finds in `body`.
        """
        metadata = {key: value for key, value in call.invocation_metadata() or () if isinstance(value, str)}
        deadline: asyncio.Timeout | None = None
        request: Request | None = None
        failure: MeshError | None = None
        try:
            with telemetry.server_span(method.full_name, metadata):
                caller = self._leaf.caller(call)
                left = call.time_remaining()
                request = admission.admit(method, caller, metadata, self._verifier, left, draining=self._draining)
                message = _read(body, read)
                _fill_request_id(message, metadata)
                bounds.check(message)
                async with asyncio.timeout_at(request.deadline) as deadline:
                    if method.server_streaming:
                        self._streams[deadline] = request
                    yield message
        except MeshError as error:
            failure = error
        except asyncio.CancelledError:
            admission.audit(method, Cancelled("The caller went away."))
            raise
        except TimeoutError as error:
            if deadline is None or request is None or not deadline.expired():
                failure = admission.internal(error, method)
            else:
                failure = request.ended[0] if request.ended else admission.late(method)
        except Exception as error:  # noqa: BLE001 - the last stop before the wire
            failure = admission.internal(error, method)
        finally:
            if deadline:
                self._streams.pop(deadline, None)
        admission.audit(method, failure)
        if failure:
            code, text = status.GRPC_CODES[failure.code_number], status.clipped(failure.message)
            await call.abort(code, text, status.to_trailers(failure))


def _read(body: bytes, read: Callable[[bytes], Any]) -> Any:
    try:
        return read(body)
    except DecodeError:
        raise RequestMalformed("The request cannot be read: it is not what this call takes, or not UTF-8.") from None


def _end(deadline: asyncio.Timeout, request: Request, error: MeshError) -> None:
    """Have a stream end now, if it is not ending already."""
    if not deadline.expired() and not request.ended:
        request.ended.append(error)
        deadline.reschedule(0)


def _fill_request_id(message: Any, metadata: Mapping[str, str]) -> None:
    """Take `Idempotency-Key` for an empty request id."""
    key = metadata.get("idempotency-key")
    if key and "request_id" in message.DESCRIPTOR.fields_by_name:
        if message.request_id not in ("", key):
            raise RequestIdAmbiguous(
                "requestId and Idempotency-Key differ; send one of them.",
                metadata={"request_id": message.request_id, "idempotency_key": key},
            )
        message.request_id = key


def every(seconds: float, step: Callable[[], Awaitable[None]]) -> Background:
    """Return background work that takes `step`, and again `seconds` after each time it ended."""

    async def run() -> None:
        while True:
            await step()
            await asyncio.sleep(seconds)

    return run


async def serve(
    config: ServiceConfig,
    leaf: Leaf,
    *register: Register,
    dependencies: Sequence[Dependency] = (),
    http: Mapping[str, http_listener.Endpoint] | None = None,
    background: Sequence[Background] = (),
    identity: IdentityFeed | None = None,
    degraded: Callable[[], str] | None = None,
) -> None:
    """Run a service until SIGTERM or SIGINT; a second one ends it at once.

    Args:
        config: who it is and where the mesh is.
        leaf: its certificate.
        register: each adds a servicer to the server.
        dependencies: each raises when what it stands for does not answer; until all do, the service is not SERVING.
        http: endpoints for rpcs whose policy says `bytes`, by full name.
        background: work that never returns; a crash is logged and it is begun again.
        identity: the identity feed; auth's by default.
        degraded: returns what works less well though the service is SERVING, empty when all is well; it stands in the
            registration, for people.
    """
    telemetry.configure(config.service, config.instance)
    stopping = _stop_signal()
    verifier, rpcs = Verifier(), contract.installed()
    health = HealthServicer()
    settings = Live(config)
    works, checks, registrations = [settings.follow, *background], list(dependencies), []

    async def tell() -> None:
        settings.meta["degraded"] = degraded() if degraded else ""

    if degraded:
        works.append(every(HEALTH_PERIOD_SECONDS, tell))

    def found_as(name: str, instance: str, port: int) -> None:
        registrations.append(Registration(name, instance, config.host, port, health_address, settings.meta))

    async with AsyncExitStack() as stack:
        hold = stack.enter_async_context
        health_address = await hold(_answering_probes(health, config))
        settings.meta["admin"] = await hold(admin.serving())
        if register or http:
            feed = identity or RemoteIdentityFeed(await hold(channel.opened("auth", config, leaf)))
            works.append(lambda: verifier.follow(feed))
            checks.insert(0, verifier.check)
        await hold(_working(works, config))
        if register:
            port = await hold(_listening(Admission(verifier, rpcs, leaf), register, config, leaf))
            found_as(config.service, config.instance, port)
        if http:
            application = http_listener.application(http, verifier, rpcs)
            port = await hold(http_listener.listening(application, config.host, config.http_port, leaf))
            found_as(f"{config.service}-http", f"{config.instance}-http", port)
        if not registrations:  # a worker is seen by its health alone
            found_as(config.service, config.instance, int(health_address.rpartition(":")[2]))

        async with discovery.registered(config, registrations), _probing(checks, health):
            await stopping.wait()
            log.info("draining")
        # Not SERVING, then deregistered: clients stop choosing this instance, calls under way go on.
        await asyncio.sleep(PROPAGATION_SECONDS if register or http else 0)
    log.info("stopped")


@asynccontextmanager
async def _answering_probes(health: HealthServicer, config: ServiceConfig) -> AsyncIterator[str]:
    """Hold a server of its own for grpc.health.v1, in clear; yield its address. Not SERVING until told."""
    await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port(f"{config.host}:{config.health_port}")
    await server.start()
    try:
        yield f"{config.host}:{port}"
    finally:
        await health.enter_graceful_shutdown()
        await server.stop(0)


@asynccontextmanager
async def _listening(
    admitting: Admission, register: Sequence[Register], config: ServiceConfig, leaf: Leaf
) -> AsyncIterator[int]:
    """Hold the gRPC server; yield its port. At the end streams end at once, calls within `drain_seconds`."""
    server = grpc.aio.server(interceptors=[admitting], options=OPTIONS)
    for add in register:
        add(server)
    port = server.add_secure_port(f"{config.host}:{config.port}", leaf.grpc_server())
    await server.start()
    try:
        yield port
    finally:
        admitting.end_streams()
        await server.stop(config.drain_seconds)


@asynccontextmanager
async def _working(works: Sequence[Background], config: ServiceConfig) -> AsyncIterator[None]:
    """Hold background work; cancelled at the end, and waited for."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(_for_ever(work, config)) for work in works]
        try:
            yield
        finally:
            for task in running:
                task.cancel()


@asynccontextmanager
async def _probing(dependencies: Sequence[Dependency], health: HealthServicer) -> AsyncIterator[None]:
    """Hold the health status at what the dependencies say; NOT_SERVING at the end."""
    prober = asyncio.create_task(_probe(dependencies, health))
    try:
        yield
    finally:
        prober.cancel()
        await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)


def _stop_signal() -> asyncio.Event:
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return stopping


async def _for_ever(work: Background, config: ServiceConfig) -> None:
    pause_seconds = 0.5
    while True:
        started = asyncio.get_running_loop().time()
        try:
            await work()
        except Exception:
            log.exception("background work of %s crashed; it begins again", config.service)
        if asyncio.get_running_loop().time() - started > 60:
            pause_seconds = 0.5
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, 30.0)


async def _probe(dependencies: Sequence[Dependency], health: HealthServicer) -> None:
    """Keep the health status what the dependencies say, for ever."""
    was = ""
    while True:
        missing = await _missing(dependencies)
        state = health_pb2.HealthCheckResponse.NOT_SERVING if missing else health_pb2.HealthCheckResponse.SERVING
        await health.set("", state)
        if missing != was:
            was = missing
            log.info("now %s", f"not serving: {missing}" if missing else "serving")
        await asyncio.sleep(HEALTH_PERIOD_SECONDS)


async def _missing(dependencies: Sequence[Dependency]) -> str:
    """Return why the service cannot serve; empty when it can."""
    for dependency in dependencies:
        try:
            async with asyncio.timeout(DEPENDENCY_SECONDS):
                await dependency()
        except TimeoutError:
            return f"{getattr(dependency, '__qualname__', dependency)} did not answer"
        except MeshError as error:
            return error.message
        except Exception as error:  # noqa: BLE001 - whatever it is, it does not answer
            return type(error).__name__
    return ""
