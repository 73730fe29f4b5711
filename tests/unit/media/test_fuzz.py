"""A few seconds of scripts/fuzz."""

from __future__ import annotations

from random import Random

import pytest

from tests.fuzz import TYPED, fuzz, mutated
from tests.hostile import seeds


@pytest.mark.timeout(300)
async def test_broken_images_end_in_typed_outcomes(tmp_path):
    told = await fuzz(20260, seconds=240, cases=120, folder=tmp_path / "slot", keep=tmp_path / "findings")

    assert told.findings == []
    assert told.outcomes.total() == 120
    assert set(told.outcomes) <= {"done", *TYPED}
    assert told.outcomes["done"] > 5  # they are broken, but not all so that nothing is decoded


async def test_what_dies_is_found_and_kept(tmp_path, monkeypatch):
    """The child of another program stands for one that a decoder ends."""
    monkeypatch.setattr("sys.executable", "/bin/false")

    told = await fuzz(1, seconds=60, cases=2, folder=tmp_path / "slot", keep=tmp_path / "findings")

    assert told.outcomes == {"WORKER_CRASHED {'status': '1'}": 2}
    assert len(told.findings) == len(list((tmp_path / "findings").iterdir())) == 2


def test_a_seed_makes_the_same_cases():
    files = list(seeds().values())

    assert [mutated(Random(f"7/{n}"), files) for n in range(20)] == [
        mutated(Random(f"7/{n}"), files) for n in range(20)
    ]
