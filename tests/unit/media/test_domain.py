from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.media.domain import Fit, Format, Gravity, Resize, Written, placed, resized, result_name

sides = st.integers(1, 16_384)


@given(sides, sides, sides, sides)
def test_inside_never_leaves_the_box_and_never_enlarges(width, height, box_width, box_height):
    got_width, got_height = resized(width, height, Resize(width=box_width, height=box_height))

    assert 1 <= got_width <= min(width, box_width)
    assert 1 <= got_height <= min(height, box_height)


@given(sides, sides, sides, sides)
def test_fit_touches_the_box(width, height, box_width, box_height):
    got = resized(width, height, Resize(width=box_width, height=box_height, fit=Fit.FIT))

    assert got[0] == box_width or got[1] == box_height
    assert got[0] <= box_width
    assert got[1] <= box_height


@given(sides, sides, st.integers(0, 20_000), st.sampled_from(Gravity))
def test_a_mark_never_leaves_the_image(free_width, free_height, margin_px, gravity):
    x, y = placed(free_width, free_height, margin_px, gravity)

    assert 0 <= x <= free_width
    assert 0 <= y <= free_height


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photo.jpg", "photo-800x533.webp"),
        ("a.b.c.png", "a.b.c-800x533.webp"),
        ("tsk_1", "tsk_1-800x533.webp"),
        (".hidden", ".hidden-800x533.webp"),
        ("x" * 255, "x" * 242 + "-800x533.webp"),
    ],
)
def test_a_result_is_named_after_its_input(name, expected):
    assert result_name(name, Written(Path("result-0.webp"), Format.WEBP, 800, 533)) == expected
