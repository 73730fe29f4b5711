"""Makes the requests that are owed to webhooks, to addresses that all the world can reach and to no others.

Every replica runs one; they share the deliveries by leases in the database. A request may be made twice (a replica was
killed before it noted the answer), always with the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpcore

from mesh import crash
from mesh.clock import Clock
from mesh.errors import Unavailable
from services.task import webhooks
from services.task.webhooks import (
    PATIENCE,
    Address,
    Claimed,
    DeliveryState,
    Failure,
    Network,
    Outcome,
    Patience,
    Webhooks,
    may_reach,
)

AT_ONCE = 32  # requests of a replica
AT_ONCE_PER_USER = 4  # so that eight users whose receivers hang, not one, would hold up the others
REQUEST_SECONDS = 10.0
CONNECT_SECONDS = 3.0  # to one address, of at most
ADDRESSES = 3
POLL_SECONDS = 1.0
USER_AGENT = "Atelier-Webhooks/1"

Resolve = Callable[[str], Awaitable[Collection[Address]]]
"""Returns the addresses that a name or a written address stands for; none when there is no such name."""

log = logging.getLogger(__name__)


class Posts(Protocol):
    """Requests to anybody."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Make one request; it always comes to something."""


class NoPublicAddress(httpcore.ConnectError):
    """Nothing that the name stands for may be connected to."""


class HttpPosts:
    """Satisfies `Posts`. Follows no redirect, uses no proxy, keeps no connection, and reads no answer's body.

    Args:
        resolve: looks at names.
        allowed: networks where receivers may be though the world cannot reach them.
        tls: what their certificates are checked against.
        seconds: from the look at the name to the answer's head.
    """

    def __init__(
        self,
        resolve: Resolve,
        allowed: Collection[Network],
        tls: ssl.SSLContext,
        seconds: float = REQUEST_SECONDS,
    ) -> None:
        self._seconds = seconds
        # Without connections to keep, each request looks at its name anew.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=_CheckedAddresses(resolve, allowed),
        )

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        sent = {
            "host": _host(url),
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            "connection": "close",
            **headers,
        }
        try:
            async with asyncio.timeout(self._seconds):
                async with self._pool.stream("POST", url, headers=list(sent.items()), content=body) as response:
                    return Outcome(status=response.status)
        except NoPublicAddress:
            return Outcome(failure=Failure.NO_PUBLIC_ADDRESS)
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as failure:
            return Outcome(failure=Failure.TLS_FAILED if _is_tls(failure) else Failure.UNREACHABLE)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, TimeoutError):
            return Outcome(failure=Failure.NO_ANSWER)


class _CheckedAddresses(httpcore.AsyncNetworkBackend):
    """Connects to addresses that it has looked up and checked itself: what a name stands for later changes nothing."""

    def __init__(self, resolve: Resolve, allowed: Collection[Network]) -> None:
        self._resolve = resolve
        self._allowed = allowed
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: httpcore.ConnectError | httpcore.ConnectTimeout = NoPublicAddress()
        reachable = [address for address in await self._resolve(host) if may_reach(address, self._allowed)]
        for address in reachable[:ADDRESSES]:
            try:
                return await self._network.connect_tcp(
                    str(address), port, CONNECT_SECONDS, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as unreachable:
                failure = unreachable
        raise failure


class Sender:
    """Makes what is owed while its `run` does.

    Args:
        owed: where webhooks and deliveries are kept.
        posts: makes the requests.
        clock: the time of day, for signatures.
        patience: how long a delivery is tried.
    """

    def __init__(self, owed: Webhooks, posts: Posts, clock: Clock, patience: Patience = PATIENCE) -> None:
        self._owed = owed
        self._posts = posts
        self._clock = clock
        self._patience = patience
        self._sending: dict[asyncio.Task[None], str] = {}
        """Whose deliveries are being made."""
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Send for ever: a background of `mesh.service.serve`."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._ended.clear()  # before looking, so that an end during the look is not slept over
                if not await self._send_some(group):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(POLL_SECONDS):
                            await self._ended.wait()

    async def _send_some(self, group: asyncio.TaskGroup) -> bool:
        """Begin what is due; return whether there was anything."""
        room = AT_ONCE - len(self._sending)
        if not room:
            return False
        try:
            claimed = await self._owed.claim(room, AT_ONCE_PER_USER, {*self._sending.values()}, self._patience)
        except Unavailable as failure:
            log.warning("webhooks wait", extra={"failure": failure.message})
            return False
        for each in claimed:
            sending = group.create_task(self._send(each))
            self._sending[sending] = each.delivery.user_id
            sending.add_done_callback(self._done)
        return bool(claimed)

    def _done(self, sending: asyncio.Task[None]) -> None:
        del self._sending[sending]
        self._ended.set()

    async def _send(self, claimed: Claimed) -> None:
        delivery = claimed.delivery
        try:
            outcome = await self._outcome(claimed)
        except asyncio.CancelledError:
            with suppress(Unavailable):
                await self._owed.release(delivery)  # this replica stops: another need not wait for the lease
            raise
        except Exception:  # a bug: one delivery's must not hold up the others
            log.exception("webhook not sent", extra={"delivery_id": delivery.delivery_id})
            outcome = Outcome(failure=Failure.NO_ANSWER)
        crash.point("webhook: posted")
        jitter = random.random()  # noqa: S311 - spreads requests over time, keeps no secret
        try:
            after = await self._owed.settle(delivery, outcome, self._patience, jitter)
        except Unavailable as failure:  # it is sent again when the lease is over
            log.warning("webhook not noted", extra={"delivery_id": delivery.delivery_id, "failure": failure.message})
            return
        if after is not None and after.state is DeliveryState.FAILED:
            log.warning(
                "webhook given up",
                extra={"delivery_id": delivery.delivery_id, "task_id": delivery.task_id, "reason": after.failure},
            )

    async def _outcome(self, claimed: Claimed) -> Outcome:
        if claimed.url is None:
            return Outcome(failure=Failure.WEBHOOK_DELETED)
        headers = webhooks.headers(claimed.delivery, claimed.secrets, self._clock.now())
        return await self._posts.post(claimed.url, headers, claimed.delivery.body.encode())


def _host(url: str) -> str:
    """Return what a URL's server is to be called; httpcore would leave out the brackets of an IPv6 address."""
    parts = urlsplit(url)
    return parts.netloc.removesuffix({"http": ":80", "https": ":443"}[parts.scheme])


def _is_tls(failure: BaseException | None) -> bool:
    """Tell whether a connection was made and its other side is not who it should be, or speaks no TLS."""
    while failure is not None and not isinstance(failure, ssl.SSLError):
        failure = failure.__context__
    return failure is not None


@asynccontextmanager
async def posting(allowed: Collection[Network]) -> AsyncIterator[HttpPosts]:
    """Hold what makes requests over the real network."""
    # Of its own: names that take long to look up must not hold up whatever else runs in threads.
    threads = ThreadPoolExecutor(AT_ONCE, "webhook-names")
    try:
        yield HttpPosts(partial(_addresses, threads), allowed, httpcore.default_ssl_context())
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


async def _addresses(threads: ThreadPoolExecutor, host: str) -> list[Address]:
    look = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(threads, look)
    except (OSError, UnicodeError):
        return []
    return [ip_address(each[4][0]) for each in found]
