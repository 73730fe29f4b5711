"""`atelier doctor`: what a person needs in order to work here, looked at one by one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException

from atelier_client.client import Atelier
from atelier_client.credentials import FileCredentials, too_open
from atelier_client.errors import AtelierError, NotSignedIn
from atelier_client.server import Server
from atelier_client.version import VERSION

PROBE_SECONDS = 5.0
SKEW_SECONDS = 30.0  # a token lives 5 min and is refreshed 30 s early; a clock further off defeats that


@dataclass(frozen=True, slots=True)
class Finding:
    """How one thing is. `ok` is None for what is neither well nor wrong."""

    name: str
    ok: bool | None
    text: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    date: str
    body: bytes

    def json(self) -> dict[str, object]:
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


async def findings(server: Server, credentials: FileCredentials) -> AsyncIterator[Finding]:
    """Yield one finding after the other; what builds on something broken is left out."""
    yield _private(credentials)  # first: whoever reads the file mends its mode
    try:
        alive = _get(server, "/healthz")
    except (OSError, HTTPException) as error:
        text = f"{server.url} does not answer: {error}."
        yield Finding("server", False, text, "On the server: scripts/up starts it, scripts/status looks. "
                      "Elsewhere: --server URL or ATELIER_SERVER.")  # fmt: skip
        return
    if alive.status != 200:
        yield Finding("server", False, f"{server.url}/healthz answers {alive.status}: it is not Atelier, or ill.",
                      "Check --server and ATELIER_SERVER; on the server: scripts/status")  # fmt: skip
        return
    yield Finding("server", True, f"{server.url} answers.")
    yield _ready(_get(server, "/readyz"))
    yield _version(_get(server, "/api/v1/version"))
    yield _clock(alive.date)
    async with Atelier.connect(server.url, credentials=credentials) as atelier:
        yield await _account(atelier)


def _get(server: Server, path: str) -> _Answer:
    connection = server.http()
    connection.timeout = PROBE_SECONDS
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return _Answer(response.status, response.headers.get("date", ""), response.read(65_536))
    finally:
        connection.close()


def _private(credentials: FileCredentials) -> Finding:
    name, path = "credentials", credentials.path
    wide = too_open(path)
    try:
        session = credentials.read()
    except AtelierError as error:
        return Finding(name, False, error.message, f"rm {path}")
    if wide:
        text = " ".join(str(each) for each in wide)
        return Finding(name, False, f"{text} It is mended.", "If others use this machine: atelier logout --all")
    if session is None:
        return Finding(name, None, f"No session in {path}.", "atelier login, or atelier register")
    return Finding(name, True, f"{path} is yours alone.")


def _ready(answer: _Answer) -> Finding:
    if answer.status == 200:
        return Finding("services", True, "All services answer.")
    text = str(answer.json().get("message") or f"/readyz answers {answer.status}.")
    return Finding("services", False, text, "On the server: scripts/status shows why; just after a start, wait.")


def _version(answer: _Answer) -> Finding:
    found = answer.json().get("version")
    if found == VERSION:
        return Finding("version", True, f"Command and server are {VERSION}.")
    return Finding("version", False, f"This command is {VERSION}, the server {found or 'of no known version'}.",
                   f"Install the command of release {found}." if found else "Check --server.")  # fmt: skip


def _clock(date: str) -> Finding:
    try:
        skew_seconds = (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return Finding("clock", None, "The server does not say what time it has.")
    if abs(skew_seconds) <= SKEW_SECONDS:
        return Finding("clock", True, f"Within {SKEW_SECONDS:.0f} s of the server's.")
    side = "behind" if skew_seconds > 0 else "before"
    return Finding("clock", False, f"This machine's clock is {abs(skew_seconds):.0f} s {side} the server's.",
                   "Set the clock (NTP) on the one that is wrong.")  # fmt: skip


async def _account(atelier: Atelier) -> Finding:
    """Make the smallest call of gRPC."""
    try:
        await atelier.ping()
    except AtelierError as error:
        return Finding("account", False, f"gRPC does not pass: {error.message} ({error.reason})",
                       "Is a proxy between that speaks HTTP/1 only?")  # fmt: skip
    try:
        user = await atelier.me()
    except NotSignedIn as error:
        known = error.reason != "NOT_SIGNED_IN"
        return Finding("account", False if known else None, error.message, "atelier login")
    except AtelierError as error:
        return Finding("account", False, f"{error.message} ({error.reason})", "On the server: scripts/status")
    return Finding("account", True, f"Signed in as {user.username} ({user.user_id}).")
