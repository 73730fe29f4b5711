"""New databases of each kind for tests: copies of one that was migrated once, which takes much less time."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from mesh import migrations
from mesh.database import Database
from tests.postgres import Server

KINDS = ("sqlite", "postgresql")

NewDatabase = Callable[[str], Awaitable[str]]
"""Returns the URL of a new database with the tables of the service that it is told, or with none."""

on_sqlite = pytest.mark.parametrize("kind", ["sqlite"])
"""For a test of what PostgreSQL has not, such as a file."""

on_postgresql = pytest.mark.parametrize("kind", ["postgresql"])
"""For a test of what SQLite has not, such as several writers."""


async def are_waiting(opened: Database, count: int) -> bool:
    """Tell whether so many wait for a lock in this database of PostgreSQL's."""
    async with opened.reading() as connection:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return (await connection.execute(text(waiting))).scalar_one() == count


class SqliteDatabases:
    """Files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def new(self, service: str, folder: Path) -> str:
        """Return the URL of a new database in `folder` with a service's tables; with none if `service` is empty."""
        path = folder / f"{service or 'test'}.db"
        if service:
            shutil.copy(await self._migrated(service), path)
        return f"sqlite+aiosqlite:///{path}"

    async def _migrated(self, service: str) -> Path:
        path = self._folder / f"{service}.db"
        if not path.exists():
            await migrations.upgrade(service, f"sqlite+aiosqlite:///{path}")
        return path


class PostgresqlDatabases:
    """Databases of one server; `drop` those that were made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._migrated: dict[str, str] = {}
        self._made: list[str] = []

    async def new(self, service: str, _folder: Path) -> str:
        """Return the URL of a new database with a service's tables; with none if `service` is empty."""
        self._made.append(self._server.create(await self._template(service) if service else "template1"))
        return self._server.url(self._made[-1])

    def drop(self) -> None:
        while self._made:
            self._server.drop(self._made.pop())

    async def _template(self, service: str) -> str:
        if service not in self._migrated:
            name = self._server.create()
            await migrations.upgrade(service, self._server.url(name))
            self._migrated[service] = name
        return self._migrated[service]
