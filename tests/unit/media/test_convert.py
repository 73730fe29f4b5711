from __future__ import annotations

from dataclasses import fields

import pytest
from atelier.media.v1 import media_pb2
from google.protobuf.descriptor import Descriptor

from mesh import bounds, contract
from services.media import convert, domain, operations

CONTRACT = {kind.message_type.name: kind.message_type for kind in media_pb2.Operation.DESCRIPTOR.fields}


def test_every_operation_of_the_contract_has_a_dataclass_and_a_function():
    assert {each.__name__ for each in domain.OPERATIONS} == set(CONTRACT)
    assert {*operations.RUN, *operations.WRITE, domain.Pipeline} == set(domain.OPERATIONS)
    assert set(operations.FORMATS) == set(operations.WRITE)


@pytest.mark.parametrize("operation", domain.OPERATIONS, ids=lambda each: each.__name__)
def test_a_dataclass_has_the_fields_of_its_message(operation):
    def names(message: Descriptor) -> set[str]:
        return {field.name for field in message.fields}

    # These every operation has, though not all let people choose.
    inherited = {"format", "quality", "still"} if issubclass(operation, domain.Operation) else set()
    own = {field.name for field in fields(operation)}
    assert own - inherited <= names(CONTRACT[operation.__name__]) <= own
    for nested in CONTRACT[operation.__name__].nested_types:
        assert {field.name for field in fields(getattr(domain, nested.name))} == names(nested)


@pytest.mark.parametrize("enum", [domain.Format, domain.Fit, domain.Interest, domain.Gravity])
def test_an_enum_has_the_values_of_the_contract(enum):
    contracts = {
        each.name: each
        for each in [
            *media_pb2.DESCRIPTOR.enum_types_by_name.values(),
            *(nested for message in CONTRACT.values() for nested in message.enum_types),
        ]
    }
    prefix = f"{enum.__name__.upper()}_"

    assert {f"{prefix}{each.name}" for each in enum} == {
        value.name for value in contracts[enum.__name__].values if value.number
    }


def test_what_is_left_out_has_its_default():
    message = media_pb2.Operation(resize=media_pb2.Resize(width=800))

    assert convert.operation_from(message) == domain.Resize(width=800, fit=domain.Fit.INSIDE, format=None, quality=80)


def test_what_is_given_arrives():
    text = media_pb2.Watermark.Text(content="©", size_px=20, colour="#102030")
    message = media_pb2.Operation(
        watermark=media_pb2.Watermark(
            text=text,
            gravity=media_pb2.Watermark.GRAVITY_NORTH_WEST,
            opacity=0,
            margin_px=0,
            format=media_pb2.FORMAT_AVIF,
        )
    )

    assert convert.operation_from(message) == domain.Watermark(
        text=domain.Text(content="©", size_px=20, colour="#102030"),
        gravity=domain.Gravity.NORTH_WEST,
        opacity=0,
        margin_px=0,
        format=domain.Format.AVIF,
    )
    assert bounds.file_references(message) == []


def test_an_image_mark_is_a_file_to_fetch():
    mark = media_pb2.Watermark.Image(file_id="fil_m")
    message = media_pb2.Operation(watermark=media_pb2.Watermark(image=mark))

    assert bounds.file_references(message) == ["fil_m"]


def test_an_operation_of_a_later_release_is_left_to_another_worker():
    newer = media_pb2.Operation.FromString(b"\xfa\x3e\x00")  # field 1007

    with pytest.raises(domain.OperationUnknown) as refusal:
        convert.operation_from(newer)

    assert refusal.value.code == "UNAVAILABLE"


def test_operations_are_described_by_the_contract_and_its_comments():
    said = convert.comments(contract.IMAGE.read_bytes(), media_pb2.DESCRIPTOR.name)

    described = {each.name: each for each in convert.descriptions(said)}

    assert set(described) == {kind.json_name for kind in media_pb2.Operation.DESCRIPTOR.fields}
    assert described["convert"].description == "Changes the file format."
    parameters = {each.name: each for each in described["watermark"].parameters}
    assert parameters["text.content"].required
    assert (parameters["opacity"].type, parameters["opacity"].min, parameters["opacity"].max) == ("number", 0, 1)
    assert parameters["gravity"].values[0] == "GRAVITY_CENTRE"
    assert parameters["tiled"].type == "boolean"
    steps = {each.name: each for each in described["pipeline"].parameters}
    assert (steps["steps"].type, steps["steps[].resize.width"].type) == ("object[]", "integer")
    assert all(parameter.description for each in described.values() for parameter in each.parameters)
