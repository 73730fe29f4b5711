"""The contracts' comments, which are the documentation of every rpc and field; from the image beside the stubs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from atelier.policy.v1 import policy_pb2
from google.protobuf import descriptor_pb2

_IMAGE = Path(policy_pb2.__file__).parents[3] / "image.binpb"

# Field numbers in descriptor.proto that lead from a file to what has comments, with the field's name.
_PARTS = {
    descriptor_pb2.FileDescriptorProto: {4: "message_type", 5: "enum_type", 6: "service"},
    descriptor_pb2.DescriptorProto: {2: "field", 3: "nested_type", 4: "enum_type", 8: "oneof_decl"},
    descriptor_pb2.EnumDescriptorProto: {2: "value"},
    descriptor_pb2.ServiceDescriptorProto: {2: "method"},
}


@cache
def installed() -> Mapping[str, str]:
    """Return the comments of this installation's contracts; none when only the stubs are there."""
    if not _IMAGE.exists():
        return {}
    return comments(descriptor_pb2.FileDescriptorSet.FromString(_IMAGE.read_bytes()))


def comments(image: descriptor_pb2.FileDescriptorSet) -> dict[str, str]:
    """Return the leading comment of everything in `image` by its full name, e.g. `atelier.task.v1.Task.state`."""
    return {
        f"{file.package}.{name}": " ".join(location.leading_comments.split())
        for file in image.file
        for location in file.source_code_info.location
        if location.leading_comments and (name := ".".join(_names(file, list(location.path))))
    }


def _names(part: Any, path: list[int]) -> Iterator[str]:
    while len(path) >= 2 and path[0] in _PARTS.get(type(part), {}):
        number, index, *path = path
        part = getattr(part, _PARTS[type(part)][number])[index]
        yield part.name
