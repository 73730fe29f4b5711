"""How the tests are shared out to processes, and docs/measured.md, which `scripts/test --full` writes."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

FILE = os.environ.pop("ATELIER_TEST_MEASURED", None)  # not for the runs that tests begin
HEAD = """# Measured

What the tests of some requirements saw when they ran with their stated counts. Written by `scripts/test --full`.

- Commit: {commit}
- Date: {date}
- Machine: {cores} cores, {memory:.0f} GiB, {system}, Python {python}

| requirement | test | measured |
|---|---|---|
"""
ON_ONE_MESH = ("tests/chaos/", "tests/system/")


class ByMesh(LoadScopeScheduling):
    """Gives each file to one process, and all that share a mesh."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((folder for folder in ON_ONE_MESH if file.startswith(folder)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByMesh:
    return ByMesh(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if FILE and not config.getoption("lf"):  # the first run has said it of those that are run again, too
        config.pluginmanager.register(Measured(Path(FILE)))


class Measured:
    """What tests have recorded (`record_property`, by the requirement's id)."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            test = f"`{report.nodeid.rpartition('::')[2]}`"
            self._rows += [(key, test, str(value)) for key, value in report.user_properties]

    def pytest_sessionfinish(self) -> None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        head = HEAD.format(
            commit=commit.stdout.strip(),
            date=datetime.now(UTC).date(),
            cores=os.cpu_count(),
            memory=psutil.virtual_memory().total / 1024**3,
            system=platform.system(),
            python=platform.python_version(),
        )
        self._file.write_text(head + "".join(f"| {' | '.join(row)} |\n" for row in sorted(self._rows)))
