"""The registry: puts an instance into Consul and keeps it there, and follows the instances of others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import consul.aio
from consul import Check, ConsulException
from consul.callback import CB

from mesh import VERSION
from mesh.config import ServiceConfig

CHECK_INTERVAL = "1s"
FORGET_AFTER = "1m"  # the shortest that Consul takes; traffic follows `passing`, not this
ANSWER_SECONDS = 2.0  # of an agent on the same machine: one that hangs must not hold up a stop
HEAL_SECONDS = 3.0  # a wiped registry has everyone back well within 15 s
LONGEST_PAUSE_SECONDS = 5.0
META_BYTES = 512  # in a value of an instance's meta
WAIT = "60s"  # of a blocking query; short enough that a lost connection does not go unnoticed for long

log = logging.getLogger(__name__)
FAILURES = (ConsulException, aiohttp.ClientError, OSError, TimeoutError)


@asynccontextmanager
async def connected(config: ServiceConfig) -> AsyncIterator[consul.aio.Consul]:
    """Hold a client of the local Consul agent that may do what the service's token lets it."""
    parts = urlsplit(config.consul_url)
    client = consul.aio.Consul(
        host=parts.hostname,
        port=parts.port,
        scheme=parts.scheme,
        token=config.secret(f"consul.{config.service}"),
        connections_timeout=90,
    )
    try:
        yield client
    finally:
        await client.close()


async def require_present(client: consul.aio.Consul) -> None:
    """Raise one of `FAILURES` while Consul may tell the past: started anew, it can be read while it replays its log."""
    await client.catalog.services(consistency="consistent")


async def answers(
    client: consul.aio.Consul,
    query: Callable[..., Awaitable[tuple[str, Any]]],
    distrust: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Any]:
    """Yield what a blocking query answers, each time it may have changed, for ever.

    Args:
        client: whom the query asks.
        query: takes `index` and `wait`; returns the answer's index and the answer.
        distrust: is told why, when Consul does not answer or has lost its past.
    """
    index = last = 0
    pause_seconds = 0.1
    while True:
        try:
            if not index:
                await require_present(client)
            text, answer = await query(index=index or None, wait=WAIT)
        except FAILURES as error:
            distrust(str(error) or type(error).__name__)
            index = last = 0  # a wiped Consul counts from the beginning
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            continue
        pause_seconds = 0.1
        if int(text) < last:  # a wiped or restored Consul: its index means nothing more
            distrust("its index went backwards")
            index = last = 0
        elif int(text) == index:
            # Time is up, or Consul was restored: that wakes its waiters with what held before, and would then have them
            # wait until its new, lower index has come so far.
            index = 0
        else:
            index = last = int(text)
            yield answer


def asking(client: consul.aio.Consul, path: str) -> Callable[..., Awaitable[tuple[str, Any]]]:
    """Return the blocking query, for `answers`, of a path for which the client has no method."""

    def ask(**parameters: Any) -> Awaitable[tuple[str, Any]]:
        found = [(name, value) for name, value in parameters.items() if value is not None]
        asked: Awaitable[tuple[str, Any]] = client.http.get(
            CB.json(index=True), path, params=found, headers=client.prepare_headers()
        )
        return asked

    return ask


@dataclass(frozen=True, slots=True)
class Registration:
    """One listener of this process; `health_address` answers grpc.health.v1 in clear.

    `meta` may change while it is registered, and is carried over.
    """

    name: str
    instance: str
    host: str
    port: int
    health_address: str
    meta: dict[str, str] = field(default_factory=dict)


@asynccontextmanager
async def registered(config: ServiceConfig, registrations: list[Registration]) -> AsyncIterator[None]:
    """Keep `registrations` in the registry; take them out at the end. Consul may be away at any time."""
    async with connected(config) as client:
        keeper = asyncio.create_task(_keep(client, registrations))
        try:
            yield
        finally:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    for each in registrations:
                        await client.agent.service.deregister(each.instance)
            except FAILURES:
                log.warning("could not take %s out of the registry; its check will", config.instance)


async def _keep(client: consul.aio.Consul, registrations: list[Registration]) -> None:
    missing = first = True
    while True:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                # What stands there at first is of an earlier life, with its ports.
                present = {} if first else await client.agent.services()
                for each in registrations:
                    known = present.get(each.instance)
                    if known is None or known["Meta"] != _meta(each):
                        await _register(client, each)
                        log.info("registered %s as %s at %s:%d", each.instance, each.name, each.host, each.port)
            missing = first = False
        except FAILURES as error:
            if not missing:
                log.warning("the registry is away, calls go on: %s", error)
            missing = True
        await asyncio.sleep(0.5 if missing else HEAL_SECONDS)


async def _register(client: consul.aio.Consul, registration: Registration) -> None:
    await client.agent.service.register(
        registration.name,
        service_id=registration.instance,
        address=registration.host,
        port=registration.port,
        meta=_meta(registration),
        check=Check.grpc(registration.health_address, CHECK_INTERVAL, timeout="2s", deregister=FORGET_AFTER),
    )


def _meta(registration: Registration) -> dict[str, str]:
    """Return what an instance says of itself: who it is for, and which process made the entry."""
    said = {"version": VERSION, "process": str(os.getpid()), **registration.meta}
    # Consul refuses the whole registration for one value that is longer.
    return {key: value.encode()[:META_BYTES].decode(errors="ignore") for key, value in said.items()}


PASSING = "passing"
_WORSE = (PASSING, "warning", "critical")


def health(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return the worst status among the checks of an entry of the registry, and what that check said.

    One without a check of its own, as somebody may have written by hand, is critical: nobody knows whether it is there.
    """
    checks = entry.get("Checks") or ()
    if not any(check.get("ServiceID") == entry["Service"]["ID"] for check in checks):
        return _WORSE[-1], "it has no check"
    worst = max(checks, key=lambda check: _WORSE.index(check["Status"]) if check["Status"] in _WORSE else len(_WORSE))
    return worst["Status"], worst["Output"].strip()


class Endpoints:
    """The passing instances of one service; the last good answer stays while the registry is away."""

    def __init__(self) -> None:
        self._addresses: list[str] = []

    def addresses(self) -> list[str]:
        """Return `host:port` of each instance."""
        return list(self._addresses)

    async def follow(self, client: consul.aio.Consul, name: str) -> None:
        """Take over what the registry says of `name`, for ever."""
        async for entries in answers(client, partial(client.health.service, name)):
            found = [entry["Service"] for entry in entries if health(entry)[0] == PASSING]
            self._addresses = sorted(f"{each['Address']}:{each['Port']}" for each in found)


@asynccontextmanager
async def followed(name: str, config: ServiceConfig) -> AsyncIterator[Endpoints]:
    """Hold the instances of a service that is called otherwise than by gRPC, e.g. `storage-http`."""
    endpoints = Endpoints()
    async with connected(config) as client:
        follower = asyncio.create_task(endpoints.follow(client, name))
        try:
            yield endpoints
        finally:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower
