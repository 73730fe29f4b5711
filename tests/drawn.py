"""Operations at random, as the contract allows them: whatever a field's bounds permit, and mostly at their edges."""

from __future__ import annotations

import math
import string
from random import Random
from typing import Any

from atelier.media.v1 import media_pb2 as pb
from atelier.policy.v1 import policy_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from mesh import bounds

FILE_IDS = ("fil_1", "fil_2")  # what an operation may name
LETTERS = (
    *string.ascii_letters,
    *" \t\n <&>'\"",
    *"éßжωאبकกㄅ字한🎉👩‍🚀",
    "e\u0301",
    "\u200d",
    "\u202e",
    "\ufeff",
    "\u0001",
    "\ue000",
)
FONTS = ("Noto Serif", "Nowhere 12", "Bold Italic", "a" * 64)


def operation(random: Random) -> pb.Operation:
    """Return an operation that the task service would take."""
    message = pb.Operation()
    _fill(random, message)
    bounds.check(message)
    return message


def _fill(random: Random, message: Message) -> None:
    rules = message.DESCRIPTOR.GetOptions().Extensions[policy_pb2.rules]
    for choice in message.DESCRIPTOR.oneofs:
        # An optional field is a oneof of its own.
        if len(choice.fields) > 1 and (rules.oneof_required or random.random() < 0.5):
            _set(random, message, random.choice(choice.fields))
    needed = {random.choice(group.fields) for group in rules.any_of}
    for field in message.DESCRIPTOR.fields:
        alone = field.containing_oneof is None or len(field.containing_oneof.fields) == 1
        required = _bounds(field).required or field.name in needed
        if alone and (required or random.random() < 0.5):
            _set(random, message, field)


def _set(random: Random, message: Any, field: FieldDescriptor) -> None:
    if field.is_repeated:
        for _ in range(random.choice((1, 1, 2, 3, _bounds(field).max_length))):
            _fill(random, getattr(message, field.name).add())
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
        _fill(random, getattr(message, field.name))
    else:
        setattr(message, field.name, _value(random, field))


def _value(random: Random, field: FieldDescriptor) -> Any:
    limits = _bounds(field)
    if field.enum_type is not None:
        return random.choice(field.enum_type.values[1:]).number
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return random.random() < 0.5
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _text(random, limits)
    number = _number(random, limits.min, limits.max)
    return number if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE else round(number)


def _number(random: Random, low: float, high: float) -> float:
    """Return a number within bounds: small ones as often as large ones, and their ends."""
    if (edge := random.random()) < 0.2:
        return low if edge < 0.12 else high
    return low - 1 + math.exp(random.uniform(0, math.log(high - low + 1)))


def _text(random: Random, limits: policy_pb2.Bounds) -> str:
    if limits.file:
        return random.choice(FILE_IDS)
    if limits.pattern.startswith("#"):
        return f"#{random.randrange(1 << 24):06x}"
    if limits.pattern:
        return random.choice(FONTS)
    length = round(_number(random, 1, limits.max_length))
    return "".join(random.choices(LETTERS, k=length))[: limits.max_length]


def _bounds(field: FieldDescriptor) -> policy_pb2.Bounds:
    return field.GetOptions().Extensions[policy_pb2.bounds]
