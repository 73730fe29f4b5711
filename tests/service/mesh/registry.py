"""A stand-in for a Consul agent: its catalogue of one machine, which a test may wipe, stop or make hang."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from mesh.config import ServiceConfig


class Config(ServiceConfig):
    service = "task"


def config(folder: Path, consul_url: str, instance: str = "task-1") -> Config:
    """Return the settings of a service whose mesh is nothing but a registry."""
    (folder / "consul.task").write_text("token")
    return Config(
        ATELIER_CONSUL_URL=consul_url,
        ATELIER_BROKER_URL="amqp://nobody",
        ATELIER_CONTROL_ADDRESSES="127.0.0.1:1",
        ATELIER_DATA_DIR=folder,
        ATELIER_SECRETS_DIR=folder,
        ATELIER_INSTANCE=instance,
    )


class Registry:
    """What is registered, by instance, and in what order it came about."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, Any]] = {}
        self.passing: dict[str, list[tuple[str, int]]] = {}
        self.events: list[str] = []
        self.deregistered_at = 0.0
        self.hangs = False
        self.intentions: list[dict[str, Any]] | None = None
        self.forbids = False
        self.matches = 0
        self.url = ""
        self._index = 1
        self._changed = asyncio.Condition()
        self._site: web.TCPSite | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen, at the same port as before if there was one."""
        app = web.Application(middlewares=[self._hanging])
        app.router.add_put("/v1/agent/service/register", self._register)
        app.router.add_put("/v1/agent/service/deregister/{instance}", self._deregister)
        app.router.add_get("/v1/agent/services", self._services)
        app.router.add_get("/v1/health/service/{name}", self._health)
        app.router.add_get("/v1/catalog/services", self._catalog)
        app.router.add_get("/v1/connect/intentions", self._list_intentions)
        app.router.add_get("/v1/connect/intentions/match", self._match_intentions)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        port = int(self.url.rpartition(":")[2] or 0) if self.url else 0
        self._site = web.TCPSite(self._runner, "127.0.0.1", port)
        await self._site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def serve(self, name: str, *addresses: tuple[str, int]) -> None:
        """Let the instances of `name` that pass be these."""
        async with self._changed:
            self.passing[name] = list(addresses)
            self._index += 1
            self._changed.notify_all()

    async def intend(self, *intentions: tuple[str, str, str, int]) -> None:
        """Let the intentions be these: source, destination, action, precedence."""
        names = ("SourceName", "DestinationName", "Action", "Precedence")
        async with self._changed:
            self.intentions = [dict(zip(names, each, strict=True)) for each in intentions] or None
            self._index += 1
            self._changed.notify_all()

    def forget_index(self) -> None:
        """Count from the beginning, as a new Consul does."""
        self._index = 1

    @web.middleware
    async def _hanging(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.hangs:
            await asyncio.sleep(60)
        return await handler(request)

    async def _catalog(self, _: web.Request) -> web.Response:
        return web.json_response({name: [] for name in self.passing}, headers={"X-Consul-Index": "1"})

    async def _register(self, request: web.Request) -> web.Response:
        asked = await request.json()
        (check,) = asked.pop("checks")
        service = {"ID": asked.pop("id"), "Check": check, **{key.capitalize(): asked[key] for key in asked}}
        if any(len(value.encode()) > 512 for value in service["Meta"].values()):
            return web.Response(status=400, text="Value is too long (limit: 512 characters)")  # it means bytes
        self.services[service["ID"]] = service
        self.events.append(f"register {service['ID']}")
        return web.Response()

    async def _deregister(self, request: web.Request) -> web.Response:
        self.services.pop(request.match_info["instance"], None)
        self.events.append(f"deregister {request.match_info['instance']}")
        self.deregistered_at = time.monotonic()
        return web.Response()

    async def _services(self, request: web.Request) -> web.Response:
        return web.json_response(self.services)

    async def _list_intentions(self, request: web.Request) -> web.Response:
        async with self._changed:
            await self._changed.wait_for(lambda: self._index > int(request.query.get("index") or 0))
        return web.json_response([], headers={"X-Consul-Index": str(self._index)})  # as to a token that may read none

    async def _match_intentions(self, request: web.Request) -> web.Response:
        self.matches += 1
        if self.forbids:
            return web.Response(status=403, text="Permission denied")
        return web.json_response({request.query["name"]: self.intentions})  # 1.8 says no index here

    async def _health(self, request: web.Request) -> web.Response:
        async with self._changed:
            await self._changed.wait_for(lambda: self._index > int(request.query.get("index") or 0))
        found = self.passing.get(request.match_info["name"], [])
        checks = [
            {"ServiceID": "", "Status": "passing", "Output": ""},
            {"ServiceID": "it", "Status": "passing", "Output": ""},
        ]
        nodes = [{"Service": {"ID": "it", "Address": host, "Port": port}, "Checks": checks} for host, port in found]
        return web.json_response(nodes, headers={"X-Consul-Index": str(self._index)})


@asynccontextmanager
async def running() -> AsyncIterator[Registry]:
    """Hold a registry on a free port."""
    registry = Registry()
    await registry.start()
    try:
        yield registry
    finally:
        await registry.stop()
