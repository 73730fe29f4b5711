"""Meshes for what dies in them: on purpose on SQLite, by chance on PostgreSQL. Their workers' clocks are wrong."""

from __future__ import annotations

import tempfile
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
def settings(armed: Path) -> dict[str, str]:
    return {
        **SETTINGS,
        "ATELIER_CRASH_POINTS": str(armed),
        "TASK_ATTEMPTS": "20",  # of the usual three, those that die with their workers could all be one task's
        "PYTHONPATH": str(Path(__file__).parent / "clocks"),
        "TASK_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.1/32",  # where a test listens
    }


@pytest.fixture(scope="package")
def mesh(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str]) -> Iterator[Mesh]:
    with running(tmp_path_factory.mktemp("chaos") / "var", replicas=2, settings=settings) as mesh:
        yield mesh


@pytest.fixture
def on_postgresql(settings: dict[str, str]) -> Iterator[Mesh]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL runs as another user
        with running(Path(folder) / "var", "--postgres", replicas=2, settings=settings) as mesh:
            yield mesh
