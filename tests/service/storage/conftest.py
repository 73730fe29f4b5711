from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.databases import NewDatabase
from tests.service.storage.world import World, opened


@pytest.fixture
async def world(tmp_path: Path, new_database: NewDatabase) -> AsyncIterator[World]:
    async with opened(tmp_path, await new_database("storage")) as made:
        yield made


@pytest.fixture(scope="session")
def photos() -> Path:
    package = importlib.util.find_spec("skimage")  # found, not imported: only its pictures are installed
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "data"
