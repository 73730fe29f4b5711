"""A few seconds of scripts/fuzz."""

from __future__ import annotations

from random import Random

import pytest
from atelier.media.v1 import media_pb2 as pb

from tests import drawn
from tests.fuzz import TYPED, case, fuzz
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

    assert [case(Random(f"7/{n}"), files) for n in range(40)] == [case(Random(f"7/{n}"), files) for n in range(40)]


def test_operations_are_drawn_of_every_kind_and_up_to_the_bounds():
    operations = [drawn.operation(Random(n)) for n in range(2000)]  # each is checked by the contract's bounds

    assert {each.WhichOneof("kind") for each in operations} == set(pb.Operation.DESCRIPTOR.fields_by_name)
    assert {1, 16} <= {len(each.pipeline.steps) for each in operations}
    assert {1, 16_384} <= {each.resize.width for each in operations}
    assert {*pb.Watermark.Gravity.values()} == {each.watermark.gravity for each in operations}
