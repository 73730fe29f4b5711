"""The contract's operations as options."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from atelier.media.v1.media_pb2 import FORMAT_JPEG, FORMAT_WEBP, Operation, Resize, SmartCrop, Thumbnails, Watermark
from atelier_client import operations
from google.protobuf.descriptor import FieldDescriptor


def kind(name: str) -> FieldDescriptor:
    return next(each for each in operations.KINDS if each.name == name)


def options(name: str) -> dict[str, click.Option]:
    found = [parameter.option() for parameter in operations.parameters(kind(name).message_type)]
    return {option.opts[0]: option for option in found}


def test_every_operation_of_the_contract_is_a_command() -> None:
    names = [operations.command_name(each) for each in operations.KINDS]

    assert names[:4] == ["resize", "convert", "smart-crop", "watermark"]
    assert len(names) == len(Operation.DESCRIPTOR.fields)


def test_a_field_is_an_option_with_its_range_and_its_comment() -> None:
    quality = options("resize")["--quality"]

    assert isinstance(quality.type, click.IntRange)
    assert (quality.type.min, quality.type.max) == (1, 100)
    assert quality.help == "1..100, for lossy formats; default 80."


def test_an_enum_is_a_choice_of_short_words() -> None:
    gravity = options("watermark")["--gravity"]

    assert isinstance(gravity.type, click.Choice)
    assert list(gravity.type.choices)[:3] == ["centre", "north", "north-east"]
    assert "default south-east" in (gravity.help or "")


def test_a_choice_of_messages_goes_by_their_names() -> None:
    names = list(options("watermark"))

    assert names[:6] == ["--text", "--text-size-px", "--text-colour", "--text-font", "--image", "--image-scale"]


def test_options_make_the_operation() -> None:
    found = operations.build(kind("watermark"), {"text": "© me", "text_colour": "#ff0000", "gravity": "north"})

    text = Watermark.Text(content="© me", colour="#ff0000")
    assert found == Operation(watermark=Watermark(text=text, gravity=Watermark.GRAVITY_NORTH))


def test_a_zero_that_was_given_is_set() -> None:
    found = operations.build(kind("watermark"), {"text": "x", "opacity": 0.0})

    assert found.watermark.HasField("opacity")


def test_words_are_enum_values() -> None:
    found = operations.build(kind("resize"), {"width": 8, "fit": "fill", "format": FORMAT_WEBP})

    assert found == Operation(resize=Resize(width=8, fit=Resize.FIT_FILL, format=FORMAT_WEBP))


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("resize", {"quality": 80}, "Give --width or --height."),
        ("convert", {}, "Give --format."),
        ("smart_crop", {"width": 8}, "Give --height."),
        ("watermark", {}, "Give --text or --image."),
        ("watermark", {"text_colour": "#ffffff"}, "Give --text."),
        ("watermark", {"text": "x", "image": "logo.png"}, "--text and --image exclude each other."),
    ],
)
def test_what_the_contract_refuses_is_refused_before_anything_is_sent(
    name: str, values: dict[str, object], complaint: str
) -> None:
    with pytest.raises(click.UsageError, match=complaint):
        operations.build(kind(name), values)


def test_an_operation_without_options_that_exclude_each_other_takes_all() -> None:
    found = operations.build(kind("smart_crop"), {"width": 8, "height": 9, "interest": "entropy"})

    assert found.smart_crop == SmartCrop(width=8, height=9, interest=SmartCrop.INTEREST_ENTROPY)


def test_several_messages_are_given_as_json() -> None:
    found = operations.build(kind("thumbnails"), {"sizes": ('{"width": 8}', '{"height": 9, "format": "FORMAT_WEBP"}')})

    assert found == Operation(thumbnails=Thumbnails(sizes=[Resize(width=8), Resize(height=9, format=FORMAT_WEBP)]))


@pytest.mark.parametrize("text", ["8", "{", '{"breadth": 8}', '[{"width": 8}]'])
def test_what_is_no_such_message_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="is no Resize in JSON"):
        operations.build(kind("thumbnails"), {"sizes": (text,)})


@pytest.mark.parametrize(
    ("path", "number"), [("a.jpg", FORMAT_JPEG), ("a.JPEG", FORMAT_JPEG), ("a.b.webp", FORMAT_WEBP), ("a", None)]
)
def test_an_extension_says_the_format(path: str, number: int | None) -> None:
    assert operations.format_of(Path(path)) == number


@pytest.mark.parametrize(
    ("name", "values", "endings"),
    [
        ("resize", {"width": 8, "format": "jpeg"}, [".jpg"]),
        ("resize", {"width": 8}, [".jpg", ".png", ".webp", ".avif", ".gif", ".pdf"]),
        ("thumbnails", {"sizes": ('{"width": 8, "format": "FORMAT_PNG"}',)}, [".png"]),
        ("thumbnails", {"sizes": ('{"width": 8, "format": "FORMAT_PNG"}',) * 2}, ["-1.png", "-2.png"]),
        ("pipeline", {"steps": ('{"upscale": {}}',), "compress": 9, "compress_format": "webp"}, [".webp"]),
    ],
)
def test_the_endings_of_the_results_names_are_known_before(
    name: str, values: dict[str, object], endings: list[str]
) -> None:
    assert operations.endings(operations.build(kind(name), values)) == endings


def test_an_unknown_extension_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(click.UsageError, match=r"\.bmp.*\.avif, \.gif, \.jpeg, \.jpg, \.pdf, \.png, \.webp"):
        operations.format_of(Path("a.bmp"))
