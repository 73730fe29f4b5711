"""A real PostgreSQL for tests: its own folder and port, so that several may run on one machine."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

from scripts.local import postgresql
from scripts.local.install import postgresql as programs
from scripts.local.layout import postgresql_account
from tests.ports import free_port

START_SECONDS = 60.0  # less than one on an idle machine
PASSWORD = "secret-of-a-test"
OWNER = "tester"  # whose the databases are: no superuser, as no service is one


class Server:
    """One server that can be killed and started again with what it had on disk."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self._folder = folder
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = count()
        self._connections: dict[str, psycopg.Connection[Any]] = {}
        self.port = free_port()

    def start(self) -> None:
        """Start the server and wait until it lets somebody in."""
        bin_folder = programs()
        assert bin_folder is not None, "PostgreSQL is missing; scripts/test installs it"
        data = self._folder / "server" / "data"
        postgresql.initialise(bin_folder, data, PASSWORD)
        user = postgresql_account()
        deadline = time.monotonic() + START_SECONDS
        while (answer := postgresql.answer(self.port, PASSWORD)) != "passing":
            # It may end at once: a killed one's children hold on for a moment.
            if self._process is None or self._process.poll() is not None:
                with (self._folder / "output").open("ab") as output:
                    self._process = subprocess.Popen(
                        postgresql.command(bin_folder, data, self.port, **self._settings),
                        user=user, group=user, extra_groups=None if user is None else [],
                        cwd=data, stdout=output, stderr=output,
                    )  # fmt: skip
            if time.monotonic() > deadline:
                said = (self._folder / "output").read_text()[-2000:]
                raise RuntimeError(f"PostgreSQL did not start: {answer}\n{said}")
            time.sleep(0.05)

    def execute(self, statement: str, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement as the superuser; return its rows, if it has any."""
        if database not in self._connections:
            self._connections[database] = postgresql.connect(self.port, PASSWORD, database)
        done = self._connections[database].execute(statement.encode())
        return done.fetchall() if done.description else []

    def create(self, template: str = "template1") -> str:
        """Return the name of a new database that is a copy of `template`."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE {template} STRATEGY file_copy")
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://{OWNER}:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def kill(self) -> None:
        """End the server without a word to anybody, as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._connections.clear()


@contextmanager
def running(**settings: str) -> Iterator[Server]:
    """Hold a server in a folder that its user can enter, as pytest's own do not let him."""
    folder = Path(tempfile.mkdtemp(prefix="atelier-postgresql-"))
    folder.chmod(0o711)
    server = Server(folder, **settings)
    try:
        server.start()
        server.execute(f"CREATE ROLE {OWNER} LOGIN PASSWORD '{PASSWORD}'")
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)
