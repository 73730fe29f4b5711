"""A PostgreSQL of our own: its programs, whose process it is, its first start, who may enter which database."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psycopg
from psycopg import sql

from scripts.local.layout import DATABASES, Layout, postgresql_account
from scripts.local.programs import CannotStart

ADMIN = "postgres"  # the database's superuser
CONNECTIONS = 500  # enough for dozens of replicas; an unused one costs next to nothing


def command(bin_folder: str, data: Path, port: int, **settings: str) -> tuple[str, ...]:
    """Return what runs the server in the foreground, on loopback."""
    told = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": str(CONNECTIONS),
        "dynamic_shared_memory_type": "mmap",  # in its folder: what a kill leaves goes with that, not never
        **settings,
    }
    options = [part for name, value in told.items() for part in ("-c", f"{name}={value}")]
    return (str(Path(bin_folder) / "postgres"), "-D", str(data), *options)


def initialise(bin_folder: str, data: Path, password: str) -> None:
    """Make the folder `data` with a new server's files, unless it is there.

    Args:
        bin_folder: where the server's programs are.
        data: is made, and its parent.
        password: ADMIN's; a connection without a password is not possible.

    Raises:
        CannotStart: the server's user cannot enter the folder, or initdb failed.
    """
    if data.exists():
        return
    account = postgresql_account()
    data.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account:
        require_enterable(data.parent, account)
        shutil.chown(data.parent, account)
    fresh = data.with_name("fresh")  # renamed when it is whole: a broken-off initdb is begun anew
    shutil.rmtree(fresh, ignore_errors=True)
    with tempfile.NamedTemporaryFile("w", dir=data.parent) as secret:
        secret.write(password)
        secret.flush()
        if account:
            shutil.chown(secret.name, account)
        arguments = (
            f"--pgdata={fresh}", f"--username={ADMIN}", f"--pwfile={secret.name}", "--auth=scram-sha-256",
            "--data-checksums", "--encoding=UTF8", "--locale=C", "--no-instructions",
        )  # fmt: skip
        done = subprocess.run(
            [Path(bin_folder) / "initdb", *arguments],
            user=account, group=account, extra_groups=[] if account else None,
            cwd=data.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise CannotStart(f"PostgreSQL could not make its files:\n{done.stdout.strip()}")
    fresh.rename(data)


def require_enterable(folder: Path, account: str) -> None:
    """Check that another user gets as far as a folder.

    Raises:
        CannotStart: one of the folders above lets only its owner in.
    """
    closed = [parent for parent in folder.parents if not parent.stat().st_mode & stat.S_IXOTH]
    if closed:
        raise CannotStart(
            f"PostgreSQL does not run as root but as the user {account}, who must get to {folder}, and {closed[-1]} "
            f"lets only its owner in. Open it (chmod o+x {closed[-1]}), or keep the mesh's state elsewhere:\n\n"
            "    ATELIER_VAR=/var/lib/atelier scripts/up --postgres"
        )


def urls(layout: Layout, keys: Mapping[str, str]) -> dict[str, str]:
    """Return what tells each service where its database is and lets it in."""
    place = f"127.0.0.1:{layout.postgresql_port}"
    return {
        f"{name.upper()}_DATABASE_URL": f"postgresql+psycopg://{name}:{keys[f'postgresql.{name}']}@{place}/{name}"
        for name in DATABASES
    }


def answer(port: int, password: str) -> str:
    """Return `passing` when the server lets ADMIN in, or why it does not."""
    try:
        connect(port, password).close()
    except psycopg.Error as error:
        return str(error).strip().splitlines()[-1] or "does not answer"
    return "passing"


def connect(port: int, password: str, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
    """Return a connection of ADMIN's, each statement of which commits by itself."""
    return psycopg.connect(
        host="127.0.0.1", port=port, user=ADMIN, password=password, dbname=database, connect_timeout=2, autocommit=True
    )


def provide(connection: psycopg.Connection[tuple[object, ...]], passwords: Mapping[str, str]) -> None:
    """Make a role and a database of the same name for each of `passwords`; none can enter another's."""
    for database in ("postgres", "template1"):
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
    for name, password in passwords.items():
        # Hashed here, so that it stands in no log of the server.
        hashed = connection.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
        role = sql.Identifier(name)
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name]).fetchone():
            connection.execute(sql.SQL("CREATE ROLE {}").format(role))
        connection.execute(sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(role, sql.Literal(hashed)))
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(role))
