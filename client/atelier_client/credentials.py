"""Where a client keeps its session: in memory, or in a file that several commands share."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from atelier_client.errors import CredentialsUnreadable
from atelier_client.files import written

LOCK_SECONDS = 20.0  # longer than a refresh may take, so that a waiting command gets its result
_LOCK_POLL_SECONDS = 0.02

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """Who is signed in, and the two tokens that prove it."""

    user_id: str
    username: str
    access_token: str
    refresh_token: str
    """Opaque, single use."""
    expire_time: datetime
    """When the access token expires."""


class Credentials(Protocol):
    """Where the session of one server is kept."""

    def read(self) -> Session | None: ...

    def write(self, session: Session | None) -> None:
        """Keep `session`, or none. The caller holds the lock."""

    def locked(self) -> AbstractAsyncContextManager[None]:
        """Keep every other user of the same session out."""


class MemoryCredentials:
    """Satisfies `Credentials` for as long as the process lives."""

    def __init__(self, session: Session | None = None) -> None:
        self._session = session
        self._lock = asyncio.Lock()

    def read(self) -> Session | None:
        return self._session

    def write(self, session: Session | None) -> None:
        self._session = session

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        async with self._lock:
            yield


def default_folder() -> Path:
    """Return where the XDG base directory specification puts our credentials."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "atelier"


class FileCredentials:
    """Satisfies `Credentials` with a JSON file of all servers' sessions that its owner alone may read.

    The lock is a file beside it: a refresh token works once, so of two commands that find the access
    token expired one refreshes and the other takes over what it wrote.
    """

    def __init__(self, server: str, folder: Path | None = None) -> None:
        """Args: folder: nothing else may be kept there; None means `default_folder()`."""
        self._server = server
        self.path = (folder or default_folder()) / "credentials.json"

    def read(self) -> Session | None:
        """Return the session, or None.

        Raises:
            CredentialsUnreadable: the file is damaged, or belongs to another user.
        """
        known = self._servers().get(self._server)
        if known is None:
            return None
        try:
            return Session(**{**known, "expire_time": datetime.fromisoformat(known["expire_time"])})
        except (TypeError, KeyError, ValueError) as error:
            raise self._damaged() from error

    def write(self, session: Session | None) -> None:
        servers = dict(self._servers())
        if session is None:
            servers.pop(self._server, None)
        else:
            servers[self._server] = {**asdict(session), "expire_time": session.expire_time.isoformat()}
        self._make_folder()
        with written(self.path, mode=0o600) as file:
            file.write(json.dumps({"servers": servers}, indent=2).encode())

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        self._make_folder()
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await self._acquired(lock)
            yield
        finally:
            os.close(lock)

    async def _acquired(self, lock: int) -> None:
        # Polled, for a thread that waits in flock could not be cancelled.
        try:
            async with asyncio.timeout(LOCK_SECONDS):
                while not _try_lock(lock):  # noqa: ASYNC110 - another process's lock gives no event
                    await asyncio.sleep(_LOCK_POLL_SECONDS)
        except TimeoutError as error:
            text = f"Another process has held {self.path} for {LOCK_SECONDS:.0f} s."
            raise CredentialsUnreadable(text, str(self.path)) from error

    def _servers(self) -> Mapping[str, Any]:
        _require_private(self.path)
        try:
            servers = json.loads(self.path.read_bytes())["servers"]
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged() from error
        if not isinstance(servers, dict):
            raise self._damaged()
        return servers

    def _damaged(self) -> CredentialsUnreadable:
        return CredentialsUnreadable(f"{self.path} is damaged; delete it and sign in again.", str(self.path))

    def _make_folder(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


@dataclass(frozen=True, slots=True)
class TooOpen:
    """A file or folder that others than its owner may use."""

    path: Path
    mode: int
    wanted: int

    def __str__(self) -> str:
        return f"{self.path} had mode {self.mode:04o} instead of {self.wanted:04o}."


def too_open(path: Path) -> list[TooOpen]:
    """Return which of the file of credentials and its folder lets others in."""
    modes = [
        TooOpen(each, stat.S_IMODE(each.stat().st_mode), wanted)
        for each, wanted in ((path.parent, 0o700), (path, 0o600))
        if each.exists()
    ]
    return [each for each in modes if each.mode & ~each.wanted]


def _require_private(path: Path) -> None:
    """Mend modes that let others in, and say so: what was open may have been read."""
    for each in (path.parent, path):
        if each.exists() and each.stat().st_uid != os.geteuid():
            raise CredentialsUnreadable(f"{each} belongs to another user.", str(path))
    for found in too_open(path):
        found.path.chmod(found.wanted)
        log.warning("%s It is mended. If others use this machine: atelier logout --all", found)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
