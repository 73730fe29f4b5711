from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.media import domain
from services.media.domain import Fit, Format, Gravity, Resize, Written, canonical, placed, resized, result_name

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


def test_equal_operations_say_the_same_however_they_were_said() -> None:
    mark = domain.Watermark(image=domain.Image(file_id="fil_a"))
    same = domain.Watermark(image=domain.Image(file_id="fil_b", scale=0.2), quality=80, opacity=0.5)

    assert canonical(mark, {"fil_a": "file 1"}) == canonical(same, {"fil_b": "file 1"})
    assert canonical(mark, {"fil_a": "file 1"}) != canonical(mark, {"fil_a": "file 2"})
    assert canonical(domain.Resize(width=1), {}) != canonical(domain.Convert(), {})


def test_another_version_of_an_operation_is_another_operation() -> None:
    newer = type("Resize", (domain.Resize,), {"VERSION": domain.Resize.VERSION + 1})

    assert canonical(newer(width=1), {}) != canonical(domain.Resize(width=1), {})


def test_the_models_of_the_operations_at_hand_are_part_of_the_work() -> None:
    said = canonical(domain.RemoveBackground(), {})
    model = domain.Model(
        name="net", version="1", operation="remove_background", file="f", sha256="a" * 64, licence="MIT", source="s",
        item_bytes=1, side_px=320,
    )  # fmt: skip
    other = dataclasses.replace(model, operation="upscale", name="other")

    assert domain.resources_used(said, [model, other], "opencv 4", "fonts 1") == "net 1 aaaaaaaaaaaaaaaa"
    assert domain.resources_used(canonical(domain.Resize(width=1), {}), [model], "opencv 4", "fonts 1") == ""


def test_what_finds_faces_is_part_of_a_crop_by_faces() -> None:
    step = domain.Step(smart_crop=domain.SmartCrop(width=1, height=1, interest=domain.Interest.FACES))
    by_faces = canonical(domain.Pipeline(steps=(step,)), {})
    by_attention = canonical(domain.SmartCrop(width=1, height=1), {})
    words = canonical(domain.Watermark(text=domain.Text(content='"interest":"FACES"')), {})

    assert [domain.resources_used(said, [], "opencv 4", "fonts 1") for said in (by_faces, by_attention, words)] == [
        "opencv 4",
        "",
        "fonts 1",
    ]
    assert domain.resources_used(by_faces, [], "", "fonts 1") == ""


def test_fonts_are_part_of_what_draws_a_text() -> None:
    text = domain.Watermark(text=domain.Text(content="a"))
    in_a_pipeline = domain.Pipeline(steps=(domain.Step(watermark=text),))
    image = domain.Watermark(image=domain.Image(file_id='"text":{'))

    assert [
        domain.resources_used(canonical(work, {'"text":{': '"text":{'}), [], "opencv 4", "fonts 1")
        for work in (text, in_a_pipeline, image, domain.Resize(width=1))
    ] == ["fonts 1", "fonts 1", "", ""]
