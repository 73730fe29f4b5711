"""One real mesh for all system tests: its own state, its own ports, started and stopped by our scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.installation import Mesh, running
from tests.people import Person, registered


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    var = tmp_path_factory.mktemp("mesh") / "var"
    settings = {
        "CONTROL_RATE_SIGN_IN": "100:500",
        "CONTROL_RATE_READ": "5000:5000",
        "MEDIA_RENDERS_AT_ONCE": "8",  # so that a test can ask for too many
        "TASK_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.2/32",  # where a test listens
    }
    with running(var, replicas=2, settings=settings) as started:
        yield started


@pytest.fixture
async def http(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"{mesh.url}/api/v1/", timeout=30) as client:
        yield client


@pytest.fixture
async def person(mesh: Mesh) -> AsyncIterator[Person]:
    async with registered(mesh.url) as someone:
        yield someone


@pytest.fixture
async def another(mesh: Mesh) -> AsyncIterator[Person]:
    async with registered(mesh.url) as someone:
        yield someone
