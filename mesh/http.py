"""The HTTP listener of a service that moves bytes, behind the same policy as its gRPC server.

Each endpoint stands for an rpc whose policy says `bytes`; path and verb are its google.api.http rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from math import ceil

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mesh import admission, status, telemetry, urls
from mesh.certificates import Leaf, peer_spiffe_id
from mesh.contract import Contract, Method
from mesh.errors import Cancelled, MeshError, NotFound, PayloadTooLarge
from mesh.identity import Verifier
from mesh.intentions import Intentions

# Longer than any client of the mesh keeps an idle connection: closed here, it might be in use again over there by then.
KEEP_ALIVE_SECONDS = 75
HEAD_BYTES = 128 * 1024  # the work of a result stands in its URL, and a pipeline full of emoji takes 87 KiB there
LINGER_BYTES = 256 * 1024 * 1024  # beyond, the connection is closed under the sender's hands
LINGER_SECONDS = 30.0
SENDING_PAUSE_SECONDS = 1.0  # of a sender that waits for an answer

Endpoint = Callable[[Request], Awaitable[Response]]


class Streamed(Response):
    """An answer in pieces; when the caller goes away no more of them are made.

    Starlette's own has two more tasks for each answer, one of which waits for what the connection here knows.
    """

    def __init__(self, pieces: AsyncGenerator[bytes], status_code: int, headers: Mapping[str, str]) -> None:
        self._pieces = pieces
        self.status_code = status_code
        self.background = None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        gone = scope["state"]["gone"]
        async with aclosing(self._pieces) as pieces:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in pieces:
                if gone.done():
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class RouteNotFound(NotFound):
    reason = "ROUTE_NOT_FOUND"


def application(
    endpoints: Mapping[str, Endpoint], verifier: Verifier, intentions: Intentions, rpcs: Contract
) -> Starlette:
    """Return the ASGI application that serves `endpoints`, which are named by their rpc."""
    routes = []
    for name, endpoint in endpoints.items():
        method = rpcs.methods[name]
        if not method.bytes or method.http is None:
            raise ValueError(f"{name} is not served over HTTP: its policy does not say `bytes`")
        admitting = _admitting(endpoint, method, verifier, intentions)
        routes.append(Route(method.http.path, admitting, methods=[method.http.verb]))
    made = Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route})
    made.router.redirect_slashes = False  # to an address that only the mesh can reach
    return made


def _admitting(endpoint: Endpoint, method: Method, verifier: Verifier, intentions: Intentions) -> Endpoint:
    async def serve(request: Request) -> Response:
        metadata = {key.decode("latin-1"): value.decode("latin-1") for key, value in request.headers.raw}
        deadline: asyncio.Timeout | None = None
        failure: MeshError
        with telemetry.server_span(method.full_name, metadata):
            try:
                target = _signed_target(request, metadata) if method.signed_url else None
                admitted = admission.admit(
                    method, request.state.caller, metadata, verifier, intentions, seconds=None, target=target
                )
                async with asyncio.timeout_at(admitted.deadline) as deadline:
                    with _ending(deadline, request.state.gone):
                        response = await endpoint(request)
            except asyncio.CancelledError:  # by the listener, whose time to stop is over
                failure = admission.Draining("This instance stops, and could not wait for the end of the request.")
            except ClientDisconnect:
                failure = _gone()
            except MeshError as error:
                failure = error
            except TimeoutError as error:
                if deadline is None or not deadline.expired():
                    failure = admission.internal(error, method)
                else:
                    failure = _gone() if request.state.gone.done() else admission.late(method)
            except Exception as error:  # noqa: BLE001 - the last stop before the wire
                failure = admission.internal(error, method)
            else:
                admission.audit(method, None)
                return response
            admission.ended(method, failure)
        if isinstance(failure, PayloadTooLarge):
            await _linger(request)
        return refusal(failure)

    return serve


def _signed_target(request: Request, metadata: dict[str, str]) -> str | None:
    """Take the signature out of a URL and put it where another service would have; return what it must be of."""
    path, query = request.scope["raw_path"].decode("latin-1"), request.scope["query_string"].decode("latin-1")
    target, signature = urls.parts(path, query)
    if not signature:
        return None
    metadata[urls.SIGNATURE_KEY] = signature
    request.scope["query_string"] = target.partition("?")[2].encode("latin-1")
    return target


@contextlib.contextmanager
def _ending(deadline: asyncio.Timeout, gone: asyncio.Future[None]) -> Iterator[None]:
    """Have the deadline come at once when the caller goes away: nothing else tells who does not read just then."""

    def end(_: object) -> None:
        if not deadline.expired():
            deadline.reschedule(0)

    gone.add_done_callback(end)
    try:
        yield
    finally:
        gone.remove_done_callback(end)


def _gone() -> Cancelled:
    return Cancelled("The caller went away before the end of its request.")


async def _linger(request: Request) -> None:
    """Read on while a sender sends: most look for an answer only after they have sent everything."""
    began = time.monotonic()
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        while left > 0 and time.monotonic() - began < LINGER_SECONDS:
            message = await asyncio.wait_for(request.receive(), SENDING_PAUSE_SECONDS)
            if not message.get("more_body", False):
                return
            left -= len(message.get("body", b""))


def refusal(error: MeshError) -> Response:
    """Return `error` as the edge would show it."""
    headers = {}
    if retry_after := status.retry_after_header(error):
        headers["retry-after"] = retry_after
    if error.code == "UNAUTHENTICATED":
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(status.to_json(error), error.http_status, headers)


async def _no_route(request: Request, _: Exception) -> Response:
    return refusal(
        RouteNotFound(f"There is no {request.method} {request.url.path}.", metadata={"path": request.url.path})
    )  # fmt: skip


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # mesh.service owns the signals of the process


def _protocol(leaf: Leaf) -> type[H11Protocol]:
    class NamingItsPeer(H11Protocol):
        """Tells each request, in `request.state`, which service is its `caller`, and when that is `gone`."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            caller = leaf.service_of(peer_spiffe_id(transport.get_extra_info("ssl_object")))
            self._gone: asyncio.Future[None] = self.loop.create_future()
            self.app_state = {**self.app_state, "caller": caller, "gone": self._gone}
            super().connection_made(transport)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.more_body:
                self.flow.resume_reading()  # stopped at a full buffer: whoever does not read hears of no end

        def connection_lost(self, exc: Exception | None) -> None:
            self._gone.set_result(None)
            super().connection_lost(exc)

    return NamingItsPeer


class _Config(uvicorn.Config):
    def __init__(self, application: Starlette, leaf: Leaf, drain_seconds: float) -> None:
        super().__init__(
            application,
            http=_protocol(leaf),
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # its peers are of the mesh
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=ceil(drain_seconds),  # it takes whole ones
        )
        self._leaf = leaf

    def load(self) -> None:
        super().load()
        self.ssl = self._leaf.tls_server()  # uvicorn would make its own of files, once


class Listener:
    """An HTTP server, for services of the mesh, on a port that is bound at once."""

    def __init__(self, application: Starlette, host: str, port: int, leaf: Leaf, drain_seconds: float) -> None:
        self._socket = socket.create_server((host, port), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        self._server = _Server(_Config(application, leaf, drain_seconds))

    async def run(self) -> None:
        """Serve until `stop`."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Accept nothing more; `run` returns when what is under way has ended, at most `drain_seconds` later."""
        self._server.should_exit = True


@asynccontextmanager
async def listening(
    application: Starlette, host: str, port: int, leaf: Leaf, drain_seconds: float
) -> AsyncIterator[int]:
    """Hold an HTTP server; yield its port. At the end it accepts nothing more and finishes what is under way."""
    listener = Listener(application, host, port, leaf, drain_seconds)
    running = asyncio.create_task(listener.run())
    try:
        yield listener.port
    finally:
        listener.stop()
        await running
