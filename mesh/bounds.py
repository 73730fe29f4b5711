"""What the contracts say of fields, checked before a handler runs: required, ranges, lengths, patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from atelier.policy.v1 import policy_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from mesh.errors import InvalidArgument

DURATION = "google.protobuf.Duration"
MOST_VIOLATIONS = 20  # told at once; a refusal must fit in the 8 KiB that gRPC allows for trailers


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong with one field; `metadata` holds what `text` mentions."""

    field: str
    reason: str
    text: str
    metadata: Mapping[str, str]


_Check = Callable[[Any, str], Iterator[Violation]]  # (message, path with a dot at its end)


def check(message: Message) -> None:
    """Refuse a message that breaks the bounds of its contract.

    Raises:
        InvalidArgument: with the reason of the first violation, and the first violations by field.
    """
    found = list(islice(_violations(message, ""), MOST_VIOLATIONS))
    if found:
        first = found[0]
        error = InvalidArgument(
            f"{first.text}.",
            metadata={"field": first.field, **first.metadata},
            violations={violation.field: violation.text for violation in found},
        )
        error.reason = first.reason
        raise error


def file_references(message: Message) -> list[str]:
    """Return the ids of files that `message` names anywhere, in order, without empty ones."""
    found = []
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.message_type is not None:
            found += [reference for each in values for reference in file_references(each)]
        elif field.GetOptions().Extensions[policy_pb2.bounds].file:
            found += [each for each in values if each]
    return found


def _violations(message: Message, path: str) -> Iterator[Violation]:
    for check_part in _checks(message.DESCRIPTOR):
        yield from check_part(message, path)


@cache
def _checks(descriptor: Descriptor) -> tuple[_Check, ...]:
    """Return what to check of a message type; worked out once a type."""
    rules = descriptor.GetOptions().Extensions[policy_pb2.rules]
    checks: list[_Check] = []
    if rules.oneof_required:
        checks.append(_oneof_check(descriptor))
    checks += [_any_of_check(descriptor, group) for group in rules.any_of]
    for field in descriptor.fields:
        if field.message_type is not None:
            checks += _message_checks(field, field.message_type)
        else:
            checks += _scalar_checks(field)
    texts = [field for field in descriptor.fields if field.type == FieldDescriptor.TYPE_STRING]
    return (*checks, _text_check(texts)) if texts else tuple(checks)


def _message_checks(field: FieldDescriptor, kind: Descriptor) -> Iterator[_Check]:
    bounds = field.GetOptions().Extensions[policy_pb2.bounds]
    if bounds.required:
        yield _required_check(field) if field.is_repeated else _required_message_check(field, kind)
    if bounds.HasField("max_length") or bounds.HasField("min_length"):
        yield _length_check(field, bounds)
    if kind.full_name == DURATION:
        yield from _range_checks(field)
    elif not kind.full_name.startswith("google."):
        yield _nested_check(field)


def _scalar_checks(field: FieldDescriptor) -> Iterator[_Check]:
    bounds = field.GetOptions().Extensions[policy_pb2.bounds]
    if bounds.required:
        yield _required_check(field)
    yield from _range_checks(field)
    if bounds.HasField("max_length") or bounds.HasField("min_length"):
        yield _length_check(field, bounds)
    if bounds.pattern:
        yield _pattern_check(field, bounds)
    if field.enum_type is not None and not field.is_repeated:
        yield _enum_check(field, field.enum_type)


def _upper_snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def _oneof_check(descriptor: Descriptor) -> _Check:
    (oneof,) = (oneof for oneof in descriptor.oneofs if len(oneof.fields) > 1)
    known = ", ".join(field.json_name for field in oneof.fields)
    reason = f"{_upper_snake(descriptor.name)}_REQUIRED"

    def run(message: Any, path: str) -> Iterator[Violation]:
        if message.WhichOneof(oneof.name) is None:
            where = path.rstrip(".")
            yield Violation(where, reason, f"{where} must hold exactly one of: {known}", {"known": known})

    return run


def _any_of_check(descriptor: Descriptor, group: policy_pb2.Rules.Group) -> _Check:
    names = [descriptor.fields_by_name[name].json_name for name in group.fields]

    def run(message: Any, path: str) -> Iterator[Violation]:
        if not any(message.HasField(name) for name in group.fields):
            listed = " or ".join(names)
            yield Violation(
                path + names[0],
                f"{group.name.upper()}_REQUIRED",
                f"{path.rstrip('.') or descriptor.name} needs {listed}",
                {"fields": ", ".join(names)},
            )

    return run


def _required_message_check(field: FieldDescriptor, kind: Descriptor) -> _Check:
    rules = kind.GetOptions().Extensions[policy_pb2.rules]
    known = ", ".join(each.json_name for each in kind.fields if each.containing_oneof)

    def run(message: Any, path: str) -> Iterator[Violation]:
        if not message.HasField(field.name):
            name = path + field.json_name
            reason = f"{field.name.upper()}_REQUIRED"
            if rules.oneof_required:
                yield Violation(name, reason, f"{name} must hold exactly one of: {known}", {"known": known})
            else:
                yield Violation(name, reason, f"{name} is required", {})

    return run


def _nested_check(field: FieldDescriptor) -> _Check:
    def run(message: Any, path: str) -> Iterator[Violation]:
        if field.is_repeated:
            for index, each in enumerate(getattr(message, field.name)):
                yield from _violations(each, f"{path}{field.json_name}[{index}].")
        elif message.HasField(field.name):
            yield from _violations(getattr(message, field.name), f"{path}{field.json_name}.")

    return run


def _required_check(field: FieldDescriptor) -> _Check:
    def run(message: Any, path: str) -> Iterator[Violation]:
        if not getattr(message, field.name):
            name = path + field.json_name
            yield Violation(name, f"{field.name.upper()}_REQUIRED", f"{name} is required", {})

    return run


def _is_set(message: Any, field: FieldDescriptor) -> bool:
    return bool(message.HasField(field.name) if field.has_presence else getattr(message, field.name))


def _range_checks(field: FieldDescriptor) -> Iterator[_Check]:
    bounds = field.GetOptions().Extensions[policy_pb2.bounds]
    if bounds.HasField("min") or bounds.HasField("max"):
        yield _range_check(field, bounds)


def _number(value: Any) -> Any:
    """Return what a bound is compared with: a number itself, or the seconds of a duration."""
    return value if isinstance(value, int | float) else value.seconds + value.nanos / 1e9


def _range_check(field: FieldDescriptor, bounds: policy_pb2.Bounds) -> _Check:
    low = bounds.min if bounds.HasField("min") else float("-inf")
    high = bounds.max if bounds.HasField("max") else float("inf")
    limits = {
        **({"min": f"{low:g}" if low % 1 else f"{low:.0f}"} if bounds.HasField("min") else {}),
        **({"max": f"{high:g}" if high % 1 else f"{high:.0f}"} if bounds.HasField("max") else {}),
    }
    text = " and ".join(
        f"at {'least' if limit == 'min' else 'most'} {value}" for limit, value in limits.items()
    )  # fmt: skip

    def run(message: Any, path: str) -> Iterator[Violation]:
        value = _number(getattr(message, field.name))
        if _is_set(message, field) and not low <= value <= high:
            name = path + field.json_name
            yield Violation(
                name, "FIELD_OUT_OF_RANGE", f"{name} is {value}; it must be {text}", {"value": str(value), **limits}
            )

    return run


def _length_check(field: FieldDescriptor, bounds: policy_pb2.Bounds) -> _Check:
    unit = "items" if field.is_repeated else "bytes" if field.type == FieldDescriptor.TYPE_BYTES else "characters"

    def run(message: Any, path: str) -> Iterator[Violation]:
        length = len(getattr(message, field.name))
        name = path + field.json_name
        if bounds.HasField("max_length") and length > bounds.max_length:
            limit = str(bounds.max_length)
            text = f"{name} has {length} {unit}; at most {limit} are allowed"
            yield Violation(name, "FIELD_TOO_LONG", text, {"length": str(length), "max": limit})
        if bounds.HasField("min_length") and 0 < length < bounds.min_length:
            limit = str(bounds.min_length)
            text = f"{name} has {length} {unit}; at least {limit} are needed"
            yield Violation(name, "FIELD_TOO_SHORT", text, {"length": str(length), "min": limit})

    return run


def _pattern_check(field: FieldDescriptor, bounds: policy_pb2.Bounds) -> _Check:
    pattern = re.compile(bounds.pattern)

    def run(message: Any, path: str) -> Iterator[Violation]:
        value = getattr(message, field.name)
        if value and not pattern.fullmatch(value):
            name = path + field.json_name
            yield Violation(
                name, "FIELD_MALFORMED", f"{name} must match {bounds.pattern}", {"pattern": bounds.pattern}
            )  # fmt: skip

    return run


def _text_check(fields: Sequence[FieldDescriptor]) -> _Check:
    """Return what refuses U+0000: PostgreSQL's text has none."""

    def run(message: Any, path: str) -> Iterator[Violation]:
        for field in fields:
            value = getattr(message, field.name)
            if "\0" in value or (field.is_repeated and "\0" in "".join(value)):
                name = path + field.json_name
                yield Violation(name, "FIELD_MALFORMED", f"{name} must not hold the character U+0000", {})

    return run


def _enum_check(field: FieldDescriptor, kind: EnumDescriptor) -> _Check:
    known = {value.number for value in kind.values}

    def run(message: Any, path: str) -> Iterator[Violation]:
        value = getattr(message, field.name)
        if value not in known:
            names = ", ".join(each.name for each in kind.values if each.number)
            name = path + field.json_name
            text = f"{name} is {value}; it must be one of {names}"
            yield Violation(name, "FIELD_OUT_OF_RANGE", text, {"value": str(value), "known": names})

    return run
