"""A short storm in every run of the tests, over PostgreSQL and two of each; `scripts/chaos` makes longer ones."""

from __future__ import annotations

import pytest

from tests.chaos.storm import storm
from tests.installation import Mesh

SEED, SECONDS = 20261121, 20


@pytest.mark.timeout(480)  # the mesh starts and stops within it
async def test_a_storm_loses_nothing_and_does_nothing_twice(on_postgresql: Mesh) -> None:
    report = await storm(on_postgresql, seed=SEED, seconds=SECONDS, people=3, tell=print)

    assert report.findings.wrong == []
    assert report.faults.total() > 5
    assert report.accepted > 5
