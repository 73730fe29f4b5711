"""Between the contract's operations and the domain's. Nothing here knows one operation from another."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, cast, get_args, get_type_hints

from atelier.media.v1 import media_pb2 as pb
from atelier.policy.v1 import policy_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import Message

from services.media import domain

Comments = Mapping[str, str]
"""What the contract says of a message or field, by its full name."""

_BY_MESSAGE = {operation.__name__: operation for operation in domain.OPERATIONS}
_KINDS: list[FieldDescriptor] = list(pb.Operation.DESCRIPTOR.oneofs_by_name["kind"].fields)

_TYPES = {
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
    FieldDescriptor.CPPTYPE_STRING: "string",
    FieldDescriptor.CPPTYPE_ENUM: "enum",
    FieldDescriptor.CPPTYPE_MESSAGE: "object",
}


def operation_from(message: pb.Operation) -> domain.Work:
    """Return what the contract's operation asks for, with the defaults of what it leaves out.

    Raises:
        OperationUnknown: it is newer than this program.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise domain.OperationUnknown("The worker does not know this operation: it is older than the task.")
    chosen = getattr(message, kind)
    return cast("domain.Work", _value(chosen, _BY_MESSAGE[chosen.DESCRIPTOR.name]))


def resize_from(message: pb.RenderFileRequest) -> domain.Resize:
    """Return what a render is to be, as far as it is said."""
    return cast("domain.Resize", _value(message, domain.Resize))


def comments(image: bytes, file: str) -> Comments:
    """Return the comments of one file of a serialized FileDescriptorSet that was built with them."""
    contract = next(each for each in FileDescriptorSet.FromString(image).file if each.name == file)
    places = dict(_places(contract))
    return {
        places[tuple(location.path)]: " ".join(location.leading_comments.split())
        for location in contract.source_code_info.location
        if tuple(location.path) in places
    }


def descriptions(said: Comments) -> list[pb.OperationDescription]:
    """Return every operation of the contract, by name."""
    return [
        pb.OperationDescription(
            name=kind.json_name,
            description=said.get(kind.message_type.full_name, ""),
            parameters=_parameters(kind.message_type, said, prefix=""),
        )
        for kind in sorted(_KINDS, key=lambda kind: kind.json_name)
        if kind.message_type is not None
    ]


@cache
def _hints(wanted: Hashable) -> dict[str, Any]:
    return get_type_hints(wanted)  # takes as long as all the rest


def _value(message: Message, wanted: type[Any]) -> Any:
    hints = _hints(wanted)  # type: ignore[arg-type]  # whatever mypy says, a class is hashable
    present = {field.name: (field, value) for field, value in message.ListFields()}
    given: dict[str, Any] = {}
    for each in fields(wanted):
        if each.name in present:
            field, value = present[each.name]
            # The type itself, or what stands in `X | None` and in `tuple[X, ...]`.
            kind = next((kind for kind in get_args(hints[each.name]) if kind is not type(None)), hints[each.name])
            given[each.name] = (
                tuple(_single(field, one, kind) for one in value) if field.is_repeated else _single(field, value, kind)
            )
    return wanted(**given)


def _single(field: FieldDescriptor, value: Any, kind: type[Any]) -> Any:
    if field.message_type is not None:
        return _value(value, kind)
    if field.enum_type is not None:
        # FORMAT_JPEG of the enum Format is Format.JPEG; unset ones (0) are not in ListFields.
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", field.enum_type.name).upper() + "_"
        return kind[field.enum_type.values_by_number[value].name.removeprefix(prefix)]
    return value


def _parameters(message: Descriptor, said: Comments, prefix: str) -> Iterator[pb.OperationDescription.Parameter]:
    for field in message.fields:
        bounds = _bounds(field)
        several = "[]" if field.is_repeated else ""
        parameter = pb.OperationDescription.Parameter(
            name=prefix + field.json_name,
            type=_TYPES.get(field.cpp_type, "integer") + several,
            description=said.get(field.full_name, ""),
            required=bounds.required,
            min=bounds.min if bounds.HasField("min") else None,
            max=bounds.max if bounds.HasField("max") else None,
        )
        if field.enum_type is not None:
            parameter.values.extend(value.name for value in field.enum_type.values if value.number)
        yield parameter
        if field.message_type is not None:
            yield from _parameters(field.message_type, said, prefix=f"{prefix}{field.json_name}{several}.")


def _bounds(field: FieldDescriptor) -> policy_pb2.Bounds:
    return field.GetOptions().Extensions[policy_pb2.bounds]


def _places(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield where in the source each message and field stands (descriptor.proto, SourceCodeInfo.Location.path)."""
    for number, message in enumerate(file.message_type):
        yield from _places_in(message, (FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, number), file.package)


def _places_in(message: DescriptorProto, path: tuple[int, ...], scope: str) -> Iterator[tuple[tuple[int, ...], str]]:
    name = f"{scope}.{message.name}"
    yield path, name
    for number, field in enumerate(message.field):
        yield (*path, DescriptorProto.FIELD_FIELD_NUMBER, number), f"{name}.{field.name}"
    for number, nested in enumerate(message.nested_type):
        yield from _places_in(nested, (*path, DescriptorProto.NESTED_TYPE_FIELD_NUMBER, number), name)
