"""One mesh for what dies in it by chance and for what dies in it on purpose; its workers' clocks are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.__main__ import SETTINGS
from tests.installation import Mesh, running


@pytest.fixture(scope="package")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which a test arms points of `mesh.crash`."""
    return tmp_path_factory.mktemp("points")


@pytest.fixture(scope="package")
def mesh(tmp_path_factory: pytest.TempPathFactory, armed: Path) -> Iterator[Mesh]:
    settings = {
        **SETTINGS,
        "ATELIER_CRASH_POINTS": str(armed),
        "TASK_ATTEMPTS": "20",  # of the usual three, those that die with their workers could all be one task's
        "PYTHONPATH": str(Path(__file__).parent / "clocks"),
        "TASK_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.1/32",  # where a test listens
    }
    with running(tmp_path_factory.mktemp("chaos") / "var", replicas=2, settings=settings) as mesh:
        yield mesh
