"""What the tests of all services share: a database of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres
from tests.databases import KINDS, NewDatabase, PostgresqlDatabases, SqliteDatabases


@pytest.fixture(scope="session")
def postgresql() -> Iterator[postgres.Server]:
    # Nobody cuts this machine's power to see what is left of a test.
    with postgres.running(fsync="off", max_connections="300") as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_databases(tmp_path_factory: pytest.TempPathFactory) -> SqliteDatabases:
    return SqliteDatabases(tmp_path_factory.mktemp("migrated"))


@pytest.fixture(scope="session")
def postgresql_databases(postgresql: postgres.Server) -> PostgresqlDatabases:
    return PostgresqlDatabases(postgresql)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def new_database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NewDatabase]:
    """Make new databases with a service's tables, or none; every test that asks for it runs on each kind."""
    databases = request.getfixturevalue(f"{kind}_databases")
    yield lambda service: databases.new(service, tmp_path)
    if kind == "postgresql":
        databases.drop()


@pytest.fixture
async def url(new_database: NewDatabase) -> str:
    """Return the URL of a new, empty database."""
    return await new_database("")
