"""The file of sessions."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from atelier_client.credentials import FileCredentials, Session, default_folder, too_open
from atelier_client.errors import CredentialsUnreadable

URL = "http://127.0.0.1:8080"
SESSION = Session("usr_1", "ada", "access", "refresh", datetime(2030, 1, 2, tzinfo=UTC))

# Adds one to a number in the session, many times, each time under the lock.
COUNT = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from atelier_client.credentials import FileCredentials

async def main():
    credentials = FileCredentials(sys.argv[1], Path(sys.argv[2]))
    for _ in range(25):
        async with credentials.locked():
            session = credentials.read()
            await asyncio.sleep(0)
            credentials.write(replace(session, refresh_token=str(int(session.refresh_token) + 1)))

asyncio.run(main())
"""


@pytest.fixture
async def credentials(tmp_path: Path) -> FileCredentials:
    credentials = FileCredentials(URL, tmp_path / "atelier")
    async with credentials.locked():
        credentials.write(SESSION)
    return credentials


def test_a_session_is_kept_for_each_server(credentials: FileCredentials) -> None:
    other = FileCredentials("https://other:443", credentials.path.parent)
    other.write(SESSION)

    credentials.write(None)

    assert (credentials.read(), other.read()) == (None, SESSION)


def test_file_and_folder_are_their_owners_alone(credentials: FileCredentials) -> None:
    modes = [path.stat().st_mode & 0o777 for path in (credentials.path.parent, credentials.path)]

    assert modes == [0o700, 0o600]


def test_wider_modes_are_mended_and_told(credentials: FileCredentials, caplog: pytest.LogCaptureFixture) -> None:
    credentials.path.chmod(0o640)
    credentials.path.parent.chmod(0o755)

    with caplog.at_level(logging.WARNING):
        session = credentials.read()

    assert (session, too_open(credentials.path)) == (SESSION, [])
    assert ["mode 0755" in caplog.messages[0], "mode 0640" in caplog.messages[1]] == [True, True]


@pytest.mark.parametrize("content", ["", "[]", '{"servers": []}', '{"servers": {"http://127.0.0.1:8080": {}}}'])
def test_a_damaged_file_is_told_not_overwritten(credentials: FileCredentials, content: str) -> None:
    credentials.path.write_text(content)

    with pytest.raises(CredentialsUnreadable) as damaged:
        credentials.read()

    assert damaged.value.reason == "CREDENTIALS_UNREADABLE"
    assert credentials.path.read_text() == content


def test_writing_leaves_nothing_beside(credentials: FileCredentials) -> None:
    assert sorted(path.name for path in credentials.path.parent.iterdir()) == ["credentials.json", "credentials.lock"]
    assert json.loads(credentials.path.read_text())["servers"][URL]["username"] == "ada"


async def test_two_processes_never_hold_the_lock_at_once(credentials: FileCredentials) -> None:
    credentials.write(Session("usr_1", "ada", "access", "0", SESSION.expire_time))
    arguments = (sys.executable, "-c", COUNT, URL, str(credentials.path.parent))

    processes = [await asyncio.create_subprocess_exec(*arguments) for _ in range(2)]
    codes = [await process.wait() for process in processes]

    session = credentials.read()
    assert session is not None
    assert (codes, session.refresh_token) == ([0, 0], "50")


def test_the_folder_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")

    assert default_folder() == Path("/somewhere/atelier")
