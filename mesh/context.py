"""The request that is being served: who sent it, for whom, and until when. Held in context variables."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from mesh.errors import MeshError, Unauthenticated

T = TypeVar("T")


class TokenMissing(Unauthenticated):
    reason = "TOKEN_MISSING"


@dataclass(frozen=True, slots=True)
class User:
    """The person a request acts for, as a verified token says."""

    user_id: str
    role: str
    session_id: str
    token: str
    expire_time: datetime
    revocable: tuple[tuple[str, str], ...] = ()
    """Claims of the token and their values, any of which may be revoked."""
    signature: str = ""
    """Of the URL that speaks for them, where no token does."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is known of the present request.

    `caller` is the peer service's name (`edge` for people); `deadline` is in seconds of `time.monotonic()`,
    which is asyncio's clock too.
    """

    caller: str
    user: User | None
    request_id: str
    deadline: float
    metadata: Mapping[str, str]
    ended: list[MeshError] = field(default_factory=list)
    """Why it is ended before its time, once it is."""
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when this instance stops."""


_present: ContextVar[Request | None] = ContextVar("atelier_request", default=None)


def serve(request: Request) -> None:
    """Make `request` the present one until the running asyncio task ends; each call is served by its own."""
    _present.set(request)


def present() -> Request | None:
    """Return the present request; None outside one, as in background work."""
    return _present.get()


def _required() -> Request:
    request = _present.get()
    if request is None:
        raise RuntimeError("there is no request here: this code runs in the background")
    return request


def user() -> User:
    """Return whom the request acts for.

    Raises:
        TokenMissing: nobody; cannot happen in an rpc whose policy asks for a user.
    """
    found = _required().user
    if found is None:
        raise TokenMissing("Sign in first: this call needs an access token.")
    return found


def caller() -> str:
    """Return the name of the service that sent the request; `edge` for people."""
    return _required().caller


def request_id() -> str:
    """Return the id that ties together everything done for one outside request."""
    return _required().request_id


def metadata() -> Mapping[str, str]:
    """Return the request's metadata, or headers, by lower-case key."""
    return _required().metadata


async def until_ended(stream: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yield what `stream` does; where the mesh ends the present request before its time, raise why."""
    try:
        async for each in stream:
            yield each
    except asyncio.CancelledError:
        request = _present.get()
        if request and request.ended:
            raise request.ended[0] from None
        raise


def draining() -> asyncio.Event:
    """Return what is set when this instance stops: whoever only waits should answer then."""
    return _required().draining


def seconds_left() -> float | None:
    """Return what is left of the present request's deadline; None outside a request."""
    request = _present.get()
    return None if request is None else request.deadline - time.monotonic()
