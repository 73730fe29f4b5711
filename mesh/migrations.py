"""Brings a service's database to the schema of this code: `python -m mesh.migrations <service>`.

A service's migrations are the numbered files in services/<service>/migrations: Alembic revisions, without an Alembic
environment, since this module is it. They go forward only, and each must suit the previous release's code, which
still runs while they do.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from alembic.autogenerate import api as autogenerate
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData

from mesh import database
from mesh.errors import FailedPrecondition, MeshError

SERVICES = Path(__file__).resolve().parent.parent / "services"

_REVISION_FILE = '''\
"""{message}."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = {previous!r}


def upgrade() -> None:
{body}
'''


class DatabaseNewerThanCode(FailedPrecondition):
    reason = "DATABASE_NEWER_THAN_CODE"


class NothingToMigrate(FailedPrecondition):
    reason = "NOTHING_TO_MIGRATE"


class MigrationsMissing(FailedPrecondition):
    reason = "MIGRATIONS_MISSING"


async def upgrade(service: str, url: str, *, services: Path = SERVICES) -> tuple[str | None, str]:
    """Bring the database at `url` to the newest revision; return the revisions before and after.

    Several may run at once: the first does the work in one transaction, the others wait and find it done.

    Raises:
        DatabaseNewerThanCode: it has a revision that this code does not know.
        MigrationsMissing: the service has none.
        Unavailable: the database is locked, full, or away.
    """
    script = _script(services / service / "migrations")
    head = script.get_current_head()
    if head is None:
        raise MigrationsMissing(f"{service} has no migrations.", metadata={"service": service})

    def migrated(connection: Connection) -> str | None:
        before = MigrationContext.configure(connection).get_current_revision()
        if before == head:
            return before
        known = {revision.revision for revision in script.walk_revisions()}
        if before is not None and before not in known:
            raise DatabaseNewerThanCode(
                f"The database of {service} is at revision {before}, newer than this code, which knows {head}: "
                "check out the version that wrote it, or restore a backup.",
                metadata={"service": service, "database_revision": before, "code_revision": head},
            )

        def steps(revision: Any, _context: MigrationContext) -> Any:
            # Alembic has no public name for the way from one revision to another; its own `upgrade` command does this.
            return script._upgrade_revs(head, revision)  # noqa: SLF001 - see above

        with EnvironmentContext(Config(), script, fn=steps) as environment:
            environment.configure(connection=connection, render_as_batch=True)
            environment.run_migrations()
        return before

    async with database.migrating(url) as connection:
        before = await connection.run_sync(migrated)
    return before, head


async def differences(service: str, url: str) -> list[Any]:
    """Return what the tables in the code have and the migrations do not make in the empty database at `url`."""
    found: list[Any] = await _compared(service, url, autogenerate.compare_metadata)
    return found


async def revise(service: str, message: str) -> Path:
    """Write the next migration, from what the tables in the code have and the migrations do not make yet."""
    folder = SERVICES / service / "migrations"
    folder.mkdir(exist_ok=True)
    script = _script(folder)
    previous = script.get_current_head()
    revision = f"{int(previous or 0) + 1:04d}"
    with tempfile.TemporaryDirectory() as scratch:
        url = f"sqlite+aiosqlite:///{scratch}/migrated.db"
        operations = await _compared(service, url, autogenerate.produce_migrations)
    if operations.upgrade_ops.is_empty():
        raise NothingToMigrate(f"The migrations of {service} make its tables already.", metadata={"service": service})
    body = autogenerate.render_python_code(operations.upgrade_ops, render_as_batch=True, render_item=_plain_types)
    statements = [line for line in body.splitlines() if not line.strip().startswith("# ###")]  # Alembic's remarks
    path = folder / f"{revision}_{re.sub('[^a-z0-9]+', '_', message.lower()).strip('_')}.py"
    path.write_text(
        _REVISION_FILE.format(
            message=message.rstrip("."),
            revision=revision,
            previous=previous,
            body="\n".join(statements),
        )
    )
    return path


async def _compared(service: str, url: str, compare: Any) -> Any:
    metadata: MetaData = importlib.import_module(f"services.{service}.tables").metadata
    if _script(SERVICES / service / "migrations").get_current_head() is not None:
        await upgrade(service, url)

    def compared(connection: Connection) -> Any:
        return compare(MigrationContext.configure(connection), metadata)

    async with database.opened(url) as opened, opened.transaction() as connection:
        return await connection.run_sync(compared)


def _script(folder: Path) -> ScriptDirectory:
    if not folder.is_dir():
        raise MigrationsMissing(f"There are no migrations in {folder}.", metadata={"folder": str(folder)})
    return ScriptDirectory(str(folder), version_locations=[str(folder)])


def _plain_types(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Write our own column types as what they are in SQL: a migration must not change when the code does."""
    return "sa.BigInteger()" if kind == "type" and isinstance(item, database.Timestamp) else False


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mesh.migrations", description="Bring a service's database to date."
    )
    parser.add_argument("service", help="its database is named by <SERVICE>_DATABASE_URL")
    parser.add_argument(
        "--revise", metavar="MESSAGE", help="write the next migration from the service's tables instead"
    )
    options = parser.parse_args(arguments)
    try:
        if options.revise:
            _say(str(asyncio.run(revise(options.service, options.revise))))
            return 0
        variable = f"{options.service.upper()}_DATABASE_URL"
        if variable not in os.environ:
            parser.error(f"{variable} is not set")
        before, after = asyncio.run(upgrade(options.service, os.environ[variable]))
    except MeshError as refusal:
        said = str(getattr(refusal.__cause__, "orig", "")).replace("\n", " ")  # whoever runs this may know the driver's
        sys.stderr.write(f"{options.service}: {refusal.message}{f' It says: {said}' if said else ''}\n")
        return 1
    _say(f"{options.service}: " + (f"already at {after}" if before == after else f"{before or 'new'} → {after}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
