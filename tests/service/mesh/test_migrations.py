from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from mesh import database, migrations
from mesh.migrations import DatabaseNewerThanCode
from scripts.local.layout import DATABASES
from tests.databases import on_postgresql
from tests.postgres import PASSWORD

FIRST = """
import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_table("owner", sa.Column("name", sa.Text(), primary_key=True))
    op.create_table(
        "thing", sa.Column("owner", sa.Text(), sa.ForeignKey("owner.name", ondelete="CASCADE"), primary_key=True)
    )
    op.execute("INSERT INTO owner VALUES ('ada')")
    op.execute("INSERT INTO thing VALUES ('ada')")
"""

SECOND = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    with op.batch_alter_table("owner") as owner:
        owner.add_column(sa.Column("age", sa.Integer(), nullable=False, server_default="0"))
        owner.create_check_constraint("grown", "age >= 0")
"""

BROKEN = """
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade():
    op.execute("CREATE TABLE half (a INTEGER)")
    op.execute("INSERT INTO missing VALUES (1)")
"""


@pytest.fixture
def services(tmp_path: Path) -> Path:
    """A folder of services whose one service has one migration."""
    folder = tmp_path / "services" / "shop" / "migrations"
    folder.mkdir(parents=True)
    (folder / "0001_first.py").write_text(FIRST)
    return tmp_path / "services"


async def rows(url: str, query: str) -> list[tuple[object, ...]]:
    async with database.opened(url) as opened, opened.reading() as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


async def command(*arguments: str, url: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mesh.migrations",
        *arguments,
        env=os.environ | {f"{arguments[0].upper()}_DATABASE_URL": url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode().strip()


@pytest.mark.parametrize("service", DATABASES)
async def test_a_services_migrations_make_the_tables_of_its_code(service: str, url: str) -> None:
    assert await migrations.differences(service, url) == []


async def test_a_migration_keeps_the_rows_that_point_to_the_table_it_changes(services: Path, url: str) -> None:
    await migrations.upgrade("shop", url, services=services)
    (services / "shop" / "migrations" / "0002_age.py").write_text(SECOND)

    revisions = await migrations.upgrade("shop", url, services=services)

    assert revisions == ("0001", "0002")
    assert await rows(url, "SELECT name, age, thing.owner FROM owner JOIN thing ON thing.owner = name") == [
        ("ada", 0, "ada")
    ]


async def test_a_migration_that_fails_changes_nothing(services: Path, url: str) -> None:
    await migrations.upgrade("shop", url, services=services)
    (services / "shop" / "migrations" / "0002_age.py").write_text(SECOND)
    (services / "shop" / "migrations" / "0003_broken.py").write_text(BROKEN)

    with pytest.raises(Exception, match="missing"):
        await migrations.upgrade("shop", url, services=services)

    assert await rows(url, "SELECT version_num FROM alembic_version") == [("0001",)]
    assert await rows(url, "SELECT * FROM owner") == [("ada",)]


async def test_a_database_newer_than_the_code_is_refused_and_kept(services: Path, url: str) -> None:
    second = services / "shop" / "migrations" / "0002_age.py"
    second.write_text(SECOND)
    await migrations.upgrade("shop", url, services=services)
    second.unlink()

    with pytest.raises(DatabaseNewerThanCode) as refusal:
        await migrations.upgrade("shop", url, services=services)

    assert refusal.value.metadata == {"service": "shop", "database_revision": "0002", "code_revision": "0001"}
    assert await rows(url, "SELECT age FROM owner") == [(0,)]


async def test_a_migration_waits_for_another_that_is_at_work(services: Path, url: str) -> None:
    async with database.migrating(url):
        another = asyncio.create_task(migrations.upgrade("shop", url, services=services))
        done, _ = await asyncio.wait([another], timeout=1)

    assert not done
    assert await another == (None, "0001")


async def test_the_command_says_what_it_did_and_two_at_once_do_it_once(url: str) -> None:
    service = DATABASES[0]

    answers = await asyncio.gather(command(service, url=url), command(service, url=url))
    [(head,)] = await rows(url, "SELECT version_num FROM alembic_version")

    assert sorted(answers) == [(0, f"{service}: already at {head}"), (0, f"{service}: new → {head}")]


async def test_the_command_refuses_a_newer_database_in_one_sentence(url: str) -> None:
    service = DATABASES[0]
    await command(service, url=url)
    async with database.opened(url) as opened, opened.transaction() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    status, output = await command(service, url=url)

    assert status == 1
    assert "newer than this code" in output
    assert len(output.splitlines()) == 1


@on_postgresql
async def test_the_command_tells_why_a_database_lets_nobody_in_without_its_password(url: str) -> None:
    status, output = await command(DATABASES[0], url=url.replace(PASSWORD, "wr0ng"))

    assert status == 1
    assert "password authentication failed" in output
    assert "wr0ng" not in output
