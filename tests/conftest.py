"""Writes docs/measured.md of a whole run with the stated counts: `scripts/test --full`."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

FILE = os.environ.get("ATELIER_TEST_MEASURED")
HEAD = """# Measured

What the tests of some requirements saw when they ran with their stated counts. Written by `scripts/test --full`.

- Commit: {commit}
- Date: {date}
- Machine: {cores} cores, {memory:.0f} GiB, {system}, Python {python}

| requirement | test | measured |
|---|---|---|
"""


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
