"""A short storm in every run of the tests; `scripts/chaos` makes longer ones."""

from __future__ import annotations

import pytest

from tests.chaos.storm import storm
from tests.installation import Mesh

SEED, SECONDS = 20261121, 20


@pytest.mark.timeout(420)
async def test_a_storm_loses_nothing_and_does_nothing_twice(mesh: Mesh) -> None:
    report = await storm(mesh, seed=SEED, seconds=SECONDS, people=3, tell=print)

    assert report.findings.wrong == []
    assert report.faults.total() > 5
    assert report.accepted > 5
