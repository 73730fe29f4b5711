"""A short storm in every run of the tests; `scripts/chaos` makes longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import SETTINGS
from tests.chaos.storm import storm
from tests.installation import running

SEED, SECONDS = 20261121, 20


@pytest.mark.timeout(420)
async def test_a_storm_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    with running(tmp_path / "var", replicas=2, settings=SETTINGS) as mesh:
        report = await storm(mesh, seed=SEED, seconds=SECONDS, people=3, tell=print)

    assert report.findings.wrong == []
    assert report.faults.total() > 5
    assert report.accepted > 5
