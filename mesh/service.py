"""Runs a service: gRPC, HTTP and health listeners, registration, background work, and an orderly end.

Every rpc passes, outside in: telemetry, errors, deadline, identity and policy, bounds, handler.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from functools import partial
from math import ceil
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mesh import admin, admission, bounds, channel, contract, discovery, status, telemetry, urls
from mesh import http as http_listener
from mesh.certificates import Leaf
from mesh.config import ServiceConfig
from mesh.context import Request
from mesh.contract import Contract, Method
from mesh.discovery import Registration
from mesh.errors import Aborted, Cancelled, InvalidArgument, MeshError, PermissionDenied, Unauthenticated, Unavailable
from mesh.identity import IdentityFeed, RemoteIdentityFeed, Verifier
from mesh.intentions import Intentions
from mesh.live import Live
from mesh.ports import Ports

Register = Callable[[Any], None]
"""Generated code that adds a servicer's handlers to what it is given."""
Dependency = Callable[[], Awaitable[object]]
Background = Callable[[], Awaitable[None]]
_Call = grpc.aio.ServicerContext[Any, Any]
_Handler = Callable[[Any, _Call], Awaitable[Any]]
_Read = Callable[[bytes], Any]

HEALTH_PERIOD_SECONDS = 1.0
DEPENDENCY_SECONDS = 2.0  # no answer for so long twice in a row, and the dependency counts as away
PROPAGATION_SECONDS = 1.0  # from deregistration until every client has heard of it
READER_SECONDS = 30.0  # in which the reader of a stream takes nothing of what is ready for it: then it is dropped
STOP_SECONDS = 3.0  # beside the draining of two listeners: deregistration, propagation, closing what is open
OPTIONS = [
    ("grpc.so_reuseport", 0),  # two instances on one port would be a mistake, not a feature
    # Clients ping every 30 s (mesh.channel), and Envoy asks a control plane every 10 s whether it is alive.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # As many as callers may have under way (mesh.control.snapshot): of a thousand that wait gRPC begins to end some,
    # and calls it their own doing.
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
    # Above the 60 KiB that the edge lets in, cookies of other pages among them: gRPC's 8 KiB would be refused as 429.
    ("grpc.max_metadata_size", 80 * 1024),
    ("grpc.absolute_max_metadata_size", 96 * 1024),
]

log = logging.getLogger(__name__)


class RequestIdAmbiguous(InvalidArgument):
    reason = "REQUEST_ID_AMBIGUOUS"


class RequestMalformed(InvalidArgument):
    reason = "REQUEST_MALFORMED"


class WatcherTooSlow(Aborted):
    reason = "WATCHER_TOO_SLOW"


class Admission(grpc.GenericRpcHandler):
    """Takes the handlers of servicers, as a server would, and wraps each in everything that the contract asks of it.

    Not an interceptor, and to the server one handler of all: for every call grpc.aio would walk through interceptors,
    and look at each rpc that is registered with it.

    Args:
        verifier: of people's tokens.
        intentions: what operators take from what the policies allow.
        rpcs: the policies.
        leaf: our certificate; callers must be of the same mesh.
        reader_seconds: how long the reader of a stream may take nothing of what is ready for it.
    """

    def __init__(
        self,
        verifier: Verifier,
        intentions: Intentions,
        rpcs: Contract,
        leaf: Leaf,
        *,
        reader_seconds: float = READER_SECONDS,
    ) -> None:
        self._intentions = intentions
        self._verifier = verifier
        self._leaf = leaf
        self._rpcs = rpcs
        self._reader_seconds = reader_seconds
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._streams: dict[asyncio.Timeout, Request] = {}
        self._draining = asyncio.Event()
        verifier.on_revocation = self.end_revoked_streams
        intentions.on_change = self.end_denied_streams

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Take a servicer's handlers from generated code; one without a policy is nobody's to call."""
        for name, handler in handlers.items():
            method = self._rpcs.methods.get(f"/{service}/{name}")
            if method is not None:
                self._handlers[method.full_name] = self._wrapped(handler, method)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Take nothing: generated code says here once more what it says above."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._handlers.get(handler_call_details.method)

    def end_streams(self) -> None:
        """End every open stream with UNAVAILABLE: some last for hours, and their clients resume elsewhere.

        Calls that only wait answer now what they have.
        """
        self._draining.set()
        for deadline, request in self._streams.items():
            _end(deadline, request, admission.Draining("This instance stops; resume at another."))

    def end_revoked_streams(self) -> None:
        """End the open streams of people whose token has been revoked since they began."""
        for deadline, request in self._streams.items():
            if request.user:
                try:
                    self._verifier.require_unrevoked(request.user)
                except Unauthenticated as error:
                    _end(deadline, request, error)

    def end_denied_streams(self) -> None:
        """End the open streams of services that may not call any more."""
        for deadline, request in self._streams.items():
            try:
                self._intentions.require_allowed(request.caller)
            except PermissionDenied as error:
                _end(deadline, request, error)

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

    def _unary(self, inner: _Handler, method: Method, read: _Read) -> _Handler:
        async def serve_unary(body: bytes, call: _Call) -> Any:
            return await self._serve(method, body, read, call, inner)

        return serve_unary

    def _stream(
        self, inner: Callable[[Any, _Call], AsyncGenerator[Any, None]], method: Method, read: _Read
    ) -> _Handler:
        # Writes instead of yielding: what ends it while its reader is slow is then raised here, not in grpc.
        async def write_all(message: Any, call: _Call) -> None:
            async with aclosing(inner(message, call)) as responses:
                async for response in responses:
                    await self._write(response, call)

        async def serve_stream(body: bytes, call: _Call) -> None:
            await self._serve(method, body, read, call, write_all)

        return serve_stream

    async def _write(self, response: Any, call: _Call) -> None:
        """Send one message of a stream. It waits while what was sent before fills the reader's window.

        Raises:
            WatcherTooSlow: for too long.
        """
        try:
            async with asyncio.timeout(self._reader_seconds):
                await call.write(response)
        except grpc.aio.InternalError:
            raise asyncio.CancelledError from None  # nobody reads on; gRPC is about to say the same
        except TimeoutError:
            seconds = f"{self._reader_seconds:g}"
            raise WatcherTooSlow(
                f"Nothing was read for {seconds} s of what was ready. Watch again from the last cursor.",
                metadata={"seconds": seconds},
            ) from None

    # Requests are read here and not by gRPC, which would tell the caller of Python's exceptions.
    async def _serve(self, method: Method, body: bytes, read: _Read, call: _Call, handler: _Handler) -> Any:
        """Serve one call: let it in, end it in time, and tell its failure to the caller, the log and the audit.

        Returns what `handler` makes of the request that `read` finds in `body`.
        """
        metadata = {key: value for key, value in call.invocation_metadata() or () if isinstance(value, str)}
        deadline: asyncio.Timeout | None = None
        request: Request | None = None
        with telemetry.server_span(method.full_name, metadata):
            try:
                request = admission.admit(
                    method,
                    self._leaf.caller(call),
                    metadata,
                    self._verifier,
                    self._intentions,
                    seconds=call.time_remaining(),
                    draining=self._draining,
                )
                message = _read(body, read)
                _fill_request_id(message, metadata)
                bounds.check(message)
                async with asyncio.timeout_at(request.deadline) as deadline:
                    if method.server_streaming:
                        self._streams[deadline] = request
                    answer = await handler(message, call)
            except MeshError as error:
                failure = error
            except asyncio.CancelledError:
                admission.ended(method, Cancelled("The caller went away."))
                raise
            except TimeoutError as error:
                if deadline is None or request is None or not deadline.expired():
                    failure = admission.internal(error, method)
                else:
                    failure = request.ended[0] if request.ended else admission.late(method)
            except Exception as error:  # noqa: BLE001 - the last stop before the wire
                failure = admission.internal(error, method)
            else:
                admission.audit(method, None)
                return answer
            finally:
                if method.server_streaming and deadline:
                    self._streams.pop(deadline, None)
            admission.ended(method, failure)
        code, text = status.GRPC_CODES[failure.code_number], status.clipped(failure.message)
        try:
            return await call.abort(code, text, status.to_trailers(failure))
        except grpc.aio.InternalError:
            raise asyncio.CancelledError from None  # the caller went away meanwhile: nobody is left to tell


def _read(body: bytes, read: _Read) -> Any:
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
    """Return background work that takes `step`, and again `seconds` after it ended or found something away."""

    async def run() -> None:
        while True:
            # What is away comes back by itself: its absence must not slow the work down, as a crash would.
            with suppress(Unavailable):
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
    capacity: str = "",
) -> None:
    """Run a service until SIGTERM or SIGINT; a second one ends it at once.

    Args:
        config: who it is and where the mesh is.
        leaf: its certificate.
        register: each adds a servicer to what it is given.
        dependencies: each raises when what it stands for does not answer; until all do, the service is not SERVING.
        http: endpoints for rpcs whose policy says `bytes`, by full name.
        background: work that never returns; a crash is logged and it is begun again.
        identity: the identity feed; auth's by default.
        degraded: returns what works less well though the service is SERVING, empty when all is well; it stands in the
            registration, for people.
        capacity: what it can do and how much at a time, a JSON object; it stands in the registration, likewise.
    """
    telemetry.configure(config.service, config.instance)
    stopping = stop_signal(config)
    intentions, rpcs = Intentions(leaf), contract.installed()
    takes_urls = any(method.signed_url and method.owner == config.service for method in rpcs.methods.values())
    verifier = Verifier(config.secret(urls.KEY) if takes_urls else "")
    settings = Live(config)
    works, checks, registrations = [settings.follow, *background], list(dependencies), []
    ports = Ports(config)

    async def tell() -> None:
        settings.meta["degraded"] = degraded() if degraded else ""

    if capacity:
        settings.meta["capacity"] = capacity
    if degraded:
        works.append(every(HEALTH_PERIOD_SECONDS, tell))

    async with AsyncExitStack() as stack:
        hold = stack.enter_async_context
        health, health_address = await hold(answering_probes(config))

        def found_as(name: str, instance: str, port: int) -> None:
            registrations.append(Registration(name, instance, config.host, port, health_address, settings.meta))

        settings.meta["admin"] = await hold(admin.serving())
        if register or http:
            feed = identity or RemoteIdentityFeed(await hold(channel.opened("auth", config, leaf)))
            works.append(lambda: verifier.follow(feed))
            works.append(partial(intentions.follow, config))
            checks[:0] = [intentions.check, verifier.check]
        await hold(working(works, config))
        if register:
            admitting = Admission(verifier, intentions, rpcs, leaf)
            address = f"{config.host}:{ports.wanted('grpc', config.port)}"
            (port,) = await hold(listening(admitting, register, {address: leaf.grpc_server()}, config))
            ports.keep("grpc", port)
            found_as(config.service, config.instance, port)
        if http:
            application = http_listener.application(http, verifier, intentions, rpcs)
            wanted = ports.wanted("http", config.http_port)
            port = await hold(http_listener.listening(application, config.host, wanted, leaf, config.drain_seconds))
            ports.keep("http", port)
            found_as(f"{config.service}-http", f"{config.instance}-http", port)
        if not registrations:  # a worker is seen by its health alone
            found_as(config.service, config.instance, int(health_address.rpartition(":")[2]))
        await present(config, registrations, checks, health, stopping)
        # Clients stop choosing this instance; calls under way go on.
        await asyncio.sleep(PROPAGATION_SECONDS if register or http else 0)
    log.info("stopped")


async def present(
    config: ServiceConfig,
    registrations: list[Registration],
    dependencies: Sequence[Dependency],
    health: HealthServicer,
    stopping: asyncio.Event,
) -> None:
    """Be in the registry, as healthy as the dependencies are, until told to stop; then be neither SERVING nor there."""
    async with discovery.registered(config, registrations), _probing(dependencies, health):
        # What the start made stays: a collection that looked at it again would have every caller wait, 90 ms a time.
        gc.collect()
        gc.freeze()
        await stopping.wait()
        log.info("draining")
    # Python's own ending would look at every object once more, which a restart would wait for: most of a second.
    gc.freeze()


@asynccontextmanager
async def answering_probes(config: ServiceConfig) -> AsyncIterator[tuple[HealthServicer, str]]:
    """Hold a server of its own for grpc.health.v1, in clear; yield what it tells, not SERVING yet, and its address."""
    health = HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port(f"{config.host}:{config.health_port}")
    await server.start()
    try:
        yield health, f"{config.host}:{port}"
    finally:
        await health.enter_graceful_shutdown()
        await server.stop(0)


@asynccontextmanager
async def listening(
    admitting: Admission,
    register: Sequence[Register],
    doors: Mapping[str, grpc.ServerCredentials],
    config: ServiceConfig,
    *,
    beside: Sequence[Register] = (),
) -> AsyncIterator[list[int]]:
    """Hold the gRPC server. At the end streams end at once, calls within `drain_seconds`.

    Args:
        admitting: stands before every handler.
        register: each adds a servicer to the server.
        doors: address to what is shown there; all lead to the same handlers.
        config: who it is.
        beside: likewise, of what is no contract of ours and admits its callers itself.

    Yields:
        The port of each door.
    """
    server = grpc.aio.server(handlers=[admitting], options=OPTIONS)
    for add in register:
        add(admitting)
    for add in beside:
        add(server)
    ports = [server.add_secure_port(address, shown) for address, shown in doors.items()]
    await server.start()
    try:
        yield ports
    finally:
        admitting.end_streams()
        await server.stop(config.drain_seconds)


@asynccontextmanager
async def working(works: Sequence[Background], config: ServiceConfig) -> AsyncIterator[None]:
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


def stop_signal(config: ServiceConfig) -> asyncio.Event:
    """Return what SIGTERM and SIGINT set; a second one, or a stop that takes too long, ends the process at once."""
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()
        # By the kernel, for what hangs may be the loop, a thread, or Python itself on its way out.
        signal.alarm(ceil(STOP_SECONDS + 2 * config.drain_seconds))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    return stopping


async def _for_ever(work: Background, config: ServiceConfig) -> None:
    task, pause_seconds = asyncio.current_task(), 0.5
    assert task is not None  # noqa: S101 - a coroutine runs in one
    while True:
        started = asyncio.get_running_loop().time()
        try:
            await work()
        except Exception:
            if task.cancelling():  # to end is what it was told; a failure on the way hides that
                raise asyncio.CancelledError from None
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
            await _answers(dependency)
        except TimeoutError:
            return f"{getattr(dependency, '__qualname__', dependency)} did not answer"
        except MeshError as error:
            return error.message
        except Exception as error:  # noqa: BLE001 - whatever it is, it does not answer
            return type(error).__name__
    return ""


async def _answers(dependency: Dependency) -> None:
    """Raise when a dependency is away. One late answer may be this machine's haste: of a busy one, all are late."""
    try:
        async with asyncio.timeout(DEPENDENCY_SECONDS):
            await dependency()
    except TimeoutError:
        async with asyncio.timeout(DEPENDENCY_SECONDS):
            await dependency()
