"""A server that hears of tasks, and answers as a test says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class Heard:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: str
    """Our address that it came to."""

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> Any:
        return json.loads(self.body)

    def verified_by(self, secret: str) -> bool:
        """Tell whether the request is signed with `secret`, as docs/webhooks.md says."""
        signed = f"{self.id}.{self.headers['webhook-timestamp']}.".encode() + self.body
        key = base64.b64decode(secret.removeprefix("whsec_"))
        expected = "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
        return any(
            hmac.compare_digest(expected, each) for each in self.headers["webhook-signature"].split(" ")
        )  # fmt: skip


class Receiver:
    """What it heard, and what it answers."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.statuses: list[int] = []
        """Of the next answers; then 204."""
        self.location = ""
        self.answering = asyncio.Event()
        """Cleared, it answers nobody."""
        self.answering.set()
        self.port = 0
        self.scheme = "http"

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def ids(self, path: str = "/hook") -> list[str]:
        return [each.id for each in self.heard if each.path == path]

    async def hear(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        at = request.transport.get_extra_info("sockname")[0]
        body, headers = await request.read(), {key.lower(): value for key, value in request.headers.items()}
        self.heard.append(Heard(request.path_qs, headers, body, at))
        await self.answering.wait()
        status = self.statuses.pop(0) if self.statuses else 204
        return web.Response(status=status, headers={"location": self.location} if self.location else {})


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Hold a receiver, on all of this machine's IPv4 addresses."""
    receiver = Receiver()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", receiver.hear)
    runner = web.AppRunner(application, shutdown_timeout=0, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "0.0.0.0", 0, ssl_context=tls)
    await site.start()
    receiver.port = runner.addresses[0][1]
    receiver.scheme = "https" if tls else "http"
    try:
        yield receiver
    finally:
        receiver.answering.set()
        await runner.cleanup()
