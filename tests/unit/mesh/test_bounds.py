"""Each kind of bound, on messages made for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from atelier.policy.v1 import policy_pb2  # noqa: F401 - its options stand in the text below
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from mesh import bounds
from mesh.errors import InvalidArgument

FILE = """
name: "tests/bounds.proto" package: "atelier.tests.v1" syntax: "proto3"
dependency: "atelier/policy/v1/policy.proto" dependency: "google/protobuf/duration.proto"
message_type {
  name: "Sample"
  field { name: "page_title" number: 1 type: TYPE_STRING options { [atelier.policy.v1.bounds] { required: true } } }
  field { name: "count" number: 2 type: TYPE_INT32 options { [atelier.policy.v1.bounds] { min: 2 max: 10 } } }
  field { name: "opacity" number: 3 type: TYPE_DOUBLE options { [atelier.policy.v1.bounds] { min: 0.5 max: 1 } } }
  field {
    name: "quality" number: 4 type: TYPE_INT32 proto3_optional: true oneof_index: 1
    options { [atelier.policy.v1.bounds] { min: 1 max: 16384 } }
  }
  field { name: "note" number: 5 type: TYPE_STRING
          options { [atelier.policy.v1.bounds] { min_length: 2 max_length: 4 } } }
  field { name: "blob" number: 6 type: TYPE_BYTES options { [atelier.policy.v1.bounds] { max_length: 4 } } }
  field { name: "tags" number: 7 type: TYPE_STRING label: LABEL_REPEATED
          options { [atelier.policy.v1.bounds] { min_length: 2 max_length: 3 } } }
  field { name: "colour" number: 8 type: TYPE_STRING
          options { [atelier.policy.v1.bounds] { pattern: "#[0-9a-f]{6}" } } }
  field { name: "fit" number: 9 type: TYPE_ENUM type_name: ".atelier.tests.v1.Fit" }
  field { name: "must_fit" number: 10 type: TYPE_ENUM type_name: ".atelier.tests.v1.Fit" }
  field { name: "box" number: 11 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Box" }
  field { name: "boxes" number: 12 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Box" label: LABEL_REPEATED }
  field { name: "work" number: 13 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.MainWork" }
  field { name: "small" number: 14 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Box" oneof_index: 0 }
  field { name: "child" number: 15 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Sample" }
  field { name: "wait" number: 16 type: TYPE_MESSAGE type_name: ".google.protobuf.Duration"
          options { [atelier.policy.v1.bounds] { min: 1 max: 30 } } }
  field { name: "rows" number: 17 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Box" label: LABEL_REPEATED
          options { [atelier.policy.v1.bounds] { max_length: 2 } } }
  oneof_decl { name: "choice" }
  oneof_decl { name: "_quality" }
}
message_type {
  name: "Box"
  options { [atelier.policy.v1.rules] { any_of { name: "size" fields: "width" fields: "height" } } }
  field { name: "width" number: 1 type: TYPE_INT32 proto3_optional: true oneof_index: 0
          options { [atelier.policy.v1.bounds] { min: 1 } } }
  field { name: "height" number: 2 type: TYPE_INT32 proto3_optional: true oneof_index: 1 }
  oneof_decl { name: "_width" }
  oneof_decl { name: "_height" }
}
message_type {
  name: "MainWork"
  options { [atelier.policy.v1.rules] { oneof_required: true } }
  field { name: "resize_to" number: 1 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Box" oneof_index: 0 }
  field { name: "mark_with" number: 2 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Files" oneof_index: 0 }
  oneof_decl { name: "kind" }
}
message_type {
  name: "Order"
  field { name: "work" number: 1 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.MainWork"
          options { [atelier.policy.v1.bounds] { required: true } } }
  field { name: "main_box" number: 2 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Box"
          options { [atelier.policy.v1.bounds] { required: true } } }
  field { name: "how" number: 3 type: TYPE_ENUM type_name: ".atelier.tests.v1.Fit"
          options { [atelier.policy.v1.bounds] { required: true } } }
}
message_type {
  name: "Many"
  field { name: "boxes" number: 1 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Box" label: LABEL_REPEATED
          options { [atelier.policy.v1.bounds] { required: true } } }
}
message_type {
  name: "Files"
  field { name: "file_id" number: 1 type: TYPE_STRING options { [atelier.policy.v1.bounds] { file: true } } }
  field { name: "name" number: 2 type: TYPE_STRING }
  field { name: "others" number: 3 type: TYPE_STRING label: LABEL_REPEATED
          options { [atelier.policy.v1.bounds] { file: true } } }
  field { name: "inner" number: 4 type: TYPE_MESSAGE type_name: ".atelier.tests.v1.Files" label: LABEL_REPEATED }
}
enum_type { name: "Fit" value { name: "FIT_UNSPECIFIED" number: 0 } value { name: "FIT_FILL" number: 1 } }
"""


def _messages() -> dict[str, Any]:
    pool = descriptor_pool.Default()
    pool.Add(text_format.Parse(FILE, descriptor_pb2.FileDescriptorProto()))
    found = pool.FindFileByName("tests/bounds.proto").message_types_by_name
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


MESSAGES = _messages()
Sample, Order, Files = MESSAGES["Sample"], MESSAGES["Order"], MESSAGES["Files"]


def refused(message: Any) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as found:
        bounds.check(message)
    return found.value


def titled(**fields: object) -> Any:
    return Sample(page_title="x", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"count": 2}, {"count": 10}, {"count": 0},
        {"opacity": 0.5}, {"opacity": 1.0},
        {"quality": 1}, {"quality": 16384},
        {"note": "ab"}, {"note": "äöüß"}, {"note": ""},
        {"blob": b"1234"},
        {"tags": ["", "b"]}, {"tags": []},
        {"colour": "#00ff00"}, {"colour": ""},
        {"fit": 0}, {"fit": 1},
        {"box": {"width": 1}}, {"box": {"height": -5}}, {"boxes": [{"width": 1}, {"height": 1}]},
        {"work": {"resize_to": {"width": 1}}}, {"work": {"mark_with": {}}},
        {"small": {"width": 3}},
        {"child": {"page_title": "y"}},
        {"wait": {"seconds": 1}}, {"wait": {"seconds": 29, "nanos": 999_999_999}}, {"wait": {"seconds": 30}},
    ],
)  # fmt: skip
def test_what_keeps_its_bounds_passes(fields) -> None:
    bounds.check(titled(**fields))


@pytest.mark.parametrize(
    ("fields", "field", "reason", "metadata"),
    [
        ({"count": 1}, "count", "FIELD_OUT_OF_RANGE", {"value": "1", "min": "2", "max": "10"}),
        ({"count": 11}, "count", "FIELD_OUT_OF_RANGE", {"value": "11"}),
        ({"count": -1}, "count", "FIELD_OUT_OF_RANGE", {"value": "-1"}),
        ({"opacity": 0.49}, "opacity", "FIELD_OUT_OF_RANGE", {"value": "0.49", "min": "0.5", "max": "1"}),
        ({"opacity": math.nan}, "opacity", "FIELD_OUT_OF_RANGE", {"value": "nan"}),
        ({"opacity": math.inf}, "opacity", "FIELD_OUT_OF_RANGE", {"value": "inf"}),
        ({"opacity": -math.inf}, "opacity", "FIELD_OUT_OF_RANGE", {"value": "-inf"}),
        ({"quality": 0}, "quality", "FIELD_OUT_OF_RANGE", {"value": "0", "min": "1", "max": "16384"}),
        ({"rows": [{"width": 1}] * 3}, "rows", "FIELD_TOO_LONG", {"length": "3", "max": "2"}),
        ({"wait": {}}, "wait", "FIELD_OUT_OF_RANGE", {"value": "0.0", "min": "1", "max": "30"}),
        ({"wait": {"seconds": 30, "nanos": 1}}, "wait", "FIELD_OUT_OF_RANGE", {"max": "30"}),
        ({"note": "a"}, "note", "FIELD_TOO_SHORT", {"length": "1", "min": "2"}),
        ({"note": "abcde"}, "note", "FIELD_TOO_LONG", {"length": "5", "max": "4"}),
        ({"blob": b"12345"}, "blob", "FIELD_TOO_LONG", {"length": "5", "max": "4"}),
        ({"tags": ["a"]}, "tags", "FIELD_TOO_SHORT", {"length": "1", "min": "2"}),
        ({"tags": ["a", "b", "c", "d"]}, "tags", "FIELD_TOO_LONG", {"length": "4", "max": "3"}),
        ({"colour": "#00FF00"}, "colour", "FIELD_MALFORMED", {"pattern": "#[0-9a-f]{6}"}),
        ({"colour": "#00ff00\n"}, "colour", "FIELD_MALFORMED", {}),
        ({"colour": "x#00ff00"}, "colour", "FIELD_MALFORMED", {}),
        ({"note": "a\0b"}, "note", "FIELD_MALFORMED", {}),
        ({"tags": ["a", "\0"]}, "tags", "FIELD_MALFORMED", {}),
        ({"fit": 7}, "fit", "FIELD_OUT_OF_RANGE", {"value": "7", "known": "FIT_FILL"}),
        ({"must_fit": -1}, "mustFit", "FIELD_OUT_OF_RANGE", {"value": "-1"}),
        ({"box": {}}, "box.width", "SIZE_REQUIRED", {"fields": "width, height"}),
        ({"box": {"width": 0}}, "box.width", "FIELD_OUT_OF_RANGE", {"value": "0", "min": "1"}),
        ({"boxes": [{"width": 1}, {}]}, "boxes[1].width", "SIZE_REQUIRED", {}),
        ({"small": {}}, "small.width", "SIZE_REQUIRED", {}),
        ({"work": {}}, "work", "MAIN_WORK_REQUIRED", {"known": "resizeTo, markWith"}),
        ({"work": {"resize_to": {"width": -1}}}, "work.resizeTo.width", "FIELD_OUT_OF_RANGE", {"value": "-1"}),
        ({"child": {"child": {"page_title": "y", "count": 1}, "page_title": "y"}}, "child.child.count",
         "FIELD_OUT_OF_RANGE", {"value": "1"}),
    ],
)  # fmt: skip
def test_what_breaks_a_bound_is_refused_with_its_place(fields, field, reason, metadata) -> None:
    error = refused(titled(**fields))

    assert (error.reason, error.metadata["field"]) == (reason, field)
    assert error.metadata.items() >= metadata.items()
    assert list(error.violations) == [field]


def test_a_required_string_that_is_empty_is_named_in_the_reason() -> None:
    error = refused(Sample())

    assert (error.reason, error.metadata["field"]) == ("PAGE_TITLE_REQUIRED", "pageTitle")


def test_required_messages_and_enums_are_named_in_the_reasons() -> None:
    error = refused(Order())

    assert error.reason == "WORK_REQUIRED"
    assert error.metadata == {"field": "work", "known": "resizeTo, markWith"}
    assert error.violations == {
        "work": "work must hold exactly one of: resizeTo, markWith",
        "mainBox": "mainBox is required",
        "how": "how is required",
    }


def test_every_violation_is_told_and_the_first_gives_the_reason() -> None:
    error = refused(Sample(count=1, colour="red", boxes=[{}, {"width": 0}]))

    assert error.reason == "PAGE_TITLE_REQUIRED"
    assert list(error.violations) == ["pageTitle", "count", "colour", "boxes[0].width", "boxes[1].width"]


def test_a_limit_is_said_in_full_and_not_in_powers_of_ten() -> None:
    assert "at least 1 and at most 16384" in refused(titled(quality=20_000)).message


def test_a_large_list_of_mistakes_is_told_in_part() -> None:
    error = refused(titled(boxes=[{}] * 1000))

    assert len(error.violations) <= 20


def test_references_to_files_are_found_anywhere_in_order() -> None:
    inner = [{"file_id": "fil_3"}, {"inner": [{"others": ["fil_4"]}]}]
    message = Files(file_id="fil_1", name="fil_not", others=["fil_2", ""], inner=inner)

    assert bounds.file_references(message) == ["fil_1", "fil_2", "fil_3", "fil_4"]


def test_a_message_without_references_has_none() -> None:
    assert bounds.file_references(Files(name="fil_1")) == []


def test_a_list_of_messages_may_be_required() -> None:
    error = refused(MESSAGES["Many"]())

    assert (error.reason, error.metadata) == ("BOXES_REQUIRED", {"field": "boxes"})
