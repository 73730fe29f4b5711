"""Following Consul's intentions, and keeping them for the time without Consul."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from mesh.errors import MeshError
from mesh.intentions import FILE, Intentions
from tests.authority import TestAuthority
from tests.eventually import eventually
from tests.service.mesh.registry import Registry, config, running

DENY_USER = ("user", "task", "deny", 9)


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    async with running() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the task service's leaf lies."""
    TestAuthority().leaf("task", tmp_path / "identity")
    return tmp_path


@asynccontextmanager
async def followed(folder: Path, registry: Registry) -> AsyncIterator[Intentions]:
    intentions = born(folder)
    following = asyncio.create_task(intentions.follow(config(folder, registry.url)))
    try:
        yield intentions
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following


def born(folder: Path) -> Intentions:
    """Return what a process of the task service begins with."""
    return Intentions(TestAuthority().leaf("task", folder / "identity"))


def refusal(intentions: Intentions, caller: str = "user") -> str:
    try:
        intentions.require_allowed(caller)
    except MeshError as error:
        return error.reason
    return ""


async def test_a_change_is_followed_both_ways(registry: Registry, folder: Path) -> None:
    async with followed(folder, registry) as intentions:
        at_birth = refusal(intentions)
        await eventually(lambda: refusal(intentions) == "")

        await registry.intend(DENY_USER)
        await eventually(lambda: refusal(intentions) == "CALLER_DENIED_BY_INTENTION", within_seconds=3)
        others = refusal(intentions, "edge")
        await registry.intend()
        await eventually(lambda: refusal(intentions) == "", within_seconds=3)

    assert at_birth == "INTENTIONS_UNKNOWN"
    assert others == ""


async def test_while_consul_is_away_the_last_stay_for_the_next_life_too(registry: Registry, folder: Path) -> None:
    await registry.intend(DENY_USER)
    async with followed(folder, registry) as intentions:
        await eventually(lambda: refusal(intentions) == "CALLER_DENIED_BY_INTENTION")
        await registry.stop()
        await intentions.check()

        assert refusal(intentions) == "CALLER_DENIED_BY_INTENTION"

    later = born(folder)
    await later.check()
    assert refusal(later) == "CALLER_DENIED_BY_INTENTION"
    assert refusal(later, "edge") == ""
    assert (folder / "identity" / FILE).stat().st_mode & 0o077 == 0


async def test_what_may_not_be_read_is_not_taken_for_permission(registry: Registry, folder: Path) -> None:
    await registry.intend(DENY_USER)
    async with followed(folder, registry) as intentions:
        await eventually(lambda: refusal(intentions) == "CALLER_DENIED_BY_INTENTION")
        asked = registry.matches

        registry.forbids = True
        await registry.intend()
        await eventually(lambda: registry.matches > asked)

        assert refusal(intentions) == "CALLER_DENIED_BY_INTENTION"


@pytest.mark.parametrize("content", ["", "{", "[{}]", '[{"source": 1}]', "7"])
async def test_a_file_that_cannot_be_read_is_as_none_and_said(folder: Path, caplog, content: str) -> None:
    (folder / "identity" / FILE).write_text(content)

    with caplog.at_level(logging.ERROR):
        intentions = born(folder)

    assert refusal(intentions) == "INTENTIONS_UNKNOWN"
    with pytest.raises(MeshError):
        await intentions.check()
    assert "cannot be read" in caplog.text
