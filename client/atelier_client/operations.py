"""The contract's image operations as options of a command: a new operation appears by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from atelier.media.v1 import media_pb2
from atelier.media.v1.media_pb2 import Operation
from atelier.policy.v1 import policy_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from atelier_client.comments import installed as comments

KINDS: tuple[FieldDescriptor, ...] = tuple(Operation.DESCRIPTOR.oneofs_by_name["kind"].fields)
_FORMAT = media_pb2.DESCRIPTOR.enum_types_by_name["Format"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One value that an operation takes.

    `path` leads from the operation's message to it. In a message of a choice, e.g. Watermark.Text, the one required
    field goes by the message's name (`text`), the others have it before theirs (`text-colour`).
    """

    path: tuple[FieldDescriptor, ...]
    name: str

    @property
    def field(self) -> FieldDescriptor:
        return self.path[-1]

    @property
    def bounds(self) -> policy_pb2.Bounds:
        return _bounds(self.field)

    @property
    def is_format(self) -> bool:
        return self.field.enum_type is _FORMAT

    def option(self) -> click.Option:
        help_text = comments().get(self.path[0 if self.name == self.path[0].name else -1].full_name, "")
        if self.field.enum_type is not None:  # people type `inside` for FIT_INSIDE
            for value in self.field.enum_type.values:
                help_text = help_text.replace(value.name, _short(self.field.enum_type, value.name))
        if self.bounds.file:
            help_text = f"{help_text} A path, or the id of a file that the server has."
        return click.Option(
            [option_name(self.name), self.name],
            type=_type(self.field, self.bounds),
            multiple=self.field.is_repeated,
            help=help_text.strip(),
            metavar="PATH|ID" if self.bounds.file else "JSON" if self.field.message_type is not None else None,
        )


def command_name(kind: FieldDescriptor) -> str:
    return kind.name.replace("_", "-")


def option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parameters(descriptor: Descriptor | None, path: tuple[FieldDescriptor, ...] = ()) -> Iterator[Parameter]:
    """Yield every value below `descriptor`, in the contract's order."""
    if descriptor is None:  # of a field without a message; so the stubs type it
        return
    required = [field for field in descriptor.fields if _bounds(field).required]
    for field in descriptor.fields:
        below = (*path, field)
        if field.message_type is not None and not field.is_repeated:
            yield from parameters(field.message_type, below)
        elif path and required == [field]:
            yield Parameter(below, "_".join(each.name for each in path))
        else:
            yield Parameter(below, "_".join(each.name for each in below))


def format_of(path: Path) -> int | None:
    """Return the number of the format that an extension stands for; None without one.

    Raises:
        click.UsageError: no format goes by it.
    """
    known = {f".{_short(_FORMAT, value.name)}": value.number for value in _FORMAT.values if value.number}
    known[".jpg"] = known[".jpeg"]
    extension = path.suffix.lower()
    if extension and extension not in known:
        raise click.UsageError(
            f"No format goes by {extension}. Known are {', '.join(sorted(known))}; or give --format yourself."
        )
    return known.get(extension)


def format_called(path: Path) -> str | None:
    """Return the format that an extension stands for as people type it, e.g. `webp`. Raises as `format_of`."""
    number = format_of(path)
    return None if number is None else _short(_FORMAT, _FORMAT.values_by_number[number].name)


def build(kind: FieldDescriptor, values: Mapping[str, Any]) -> Operation:
    """Return the operation that the options' values say; what was not given is None or ().

    Raises:
        click.UsageError: something is missing, or two things exclude each other.
    """
    operation = Operation()
    message = getattr(operation, kind.name)
    message.SetInParent()
    known = list(parameters(kind.message_type))
    given = [parameter for parameter in known if values.get(parameter.name) not in (None, ())]
    _require_one_of_each_choice(given)
    for parameter in given:
        target = message
        for field in parameter.path[:-1]:
            target = getattr(target, field.name)
        _set(target, parameter.field, values[parameter.name])
    names = {parameter.path: option_name(parameter.name) for parameter in known}
    for complaint in _missing(message, (), names):
        raise click.UsageError(complaint)
    return operation


def several(operation: Operation) -> Iterator[Any]:
    """Yield what says the format of each of several results, e.g. the sizes of thumbnails."""
    for parameter, value in _said(operation):
        entry = parameter.field.message_type
        named = entry and entry.fields_by_name.get("format")
        if parameter.field.is_repeated and named and named.enum_type is _FORMAT:
            yield from value


def endings(operation: Operation) -> list[str]:
    """Return all that the names of an operation's results may have after the name that was asked for.

    Of several results it begins with their numbers; a result whose format is not said may be of any.
    """
    formats = [each.format for each in several(operation)]
    if len(formats) > 1:
        return [f"-{n}{suffix}" for n, number in enumerate(formats, 1) for suffix in _suffixes(number)]
    formats += [value for parameter, value in _said(operation) if parameter.is_format and value]
    return _suffixes(formats[0] if formats else 0)


def _suffixes(number: int) -> list[str]:
    known = {value.number: f".{_short(_FORMAT, value.name)}" for value in _FORMAT.values if value.number}
    known[media_pb2.FORMAT_JPEG] = ".jpg"  # as the server names its results
    return [known[number]] if number else list(known.values())


def _said(operation: Operation) -> Iterator[tuple[Parameter, Any]]:
    """Yield what an operation says of each of its parameters."""
    kind = operation.DESCRIPTOR.fields_by_name[operation.WhichOneof("kind") or ""]
    for parameter in parameters(kind.message_type):
        value: Any = getattr(operation, kind.name)
        for field in parameter.path:
            value = getattr(value, field.name)
        yield parameter, value


def _type(field: FieldDescriptor, bounds: policy_pb2.Bounds) -> click.ParamType[Any]:
    low = bounds.min if bounds.HasField("min") else None
    high = bounds.max if bounds.HasField("max") else None
    if field.enum_type is not None:
        names = [_short(field.enum_type, value.name) for value in field.enum_type.values if value.number]
        return click.Choice(names, case_sensitive=False)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return click.FloatRange(low, high)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return click.BOOL
    if field.cpp_type in (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE):
        return click.STRING
    return click.IntRange(None if low is None else int(low), None if high is None else int(high))


def _set(target: Any, field: FieldDescriptor, value: Any) -> None:
    each = [
        _number(field, one) if field.message_type is None else _message(field.message_type, one)
        for one in (value if field.is_repeated else [value])
    ]
    if field.is_repeated:
        getattr(target, field.name).extend(each)
    else:
        setattr(target, field.name, each[0])


def _message(kind: Descriptor, text: str) -> Message:
    """Return a message of `kind` from its JSON.

    Raises:
        click.UsageError: it is none.
    """
    message: Message = GetMessageClass(kind)()
    example = f"""{{"{kind.fields[0].json_name}": …}}"""
    try:
        given = json.loads(text)
        if isinstance(given, dict):
            return json_format.ParseDict(given, message)
    except (ValueError, json_format.ParseError) as fault:
        raise click.UsageError(f"{text} is no {kind.name} in JSON, e.g. {example}: {fault}") from fault
    raise click.UsageError(
        f"{text} is no {kind.name} in JSON, one object, e.g. {example}; for several give the option again."
    )


def _number(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is None or isinstance(value, int):
        return value
    return next(each.number for each in field.enum_type.values if _short(field.enum_type, each.name) == value)


def _short(kind: EnumDescriptor, name: str) -> str:
    """Return FIT_SMART_FILL of the enum Fit as `smart-fill`."""
    prefix = "".join(f"_{letter}" if letter.isupper() else letter for letter in kind.name).lstrip("_").upper()
    return name.removeprefix(f"{prefix}_").lower().replace("_", "-")


def _require_one_of_each_choice(given: list[Parameter]) -> None:
    chosen: dict[str, str] = {}
    for parameter in given:
        for field in parameter.path:
            choice = field.containing_oneof
            if choice is None or len(choice.fields) == 1:  # `optional` is a choice of one
                continue
            other = chosen.setdefault(choice.full_name, field.name)
            if other != field.name:
                raise click.UsageError(f"{option_name(other)} and {option_name(field.name)} exclude each other.")


def _missing(
    message: Message, path: tuple[FieldDescriptor, ...], names: Mapping[tuple[FieldDescriptor, ...], str]
) -> Iterator[str]:
    """Yield what the contract requires and `message` lacks: better said before a file is sent than after."""
    descriptor = message.DESCRIPTOR
    set_names = {field.name for field, _ in message.ListFields()}
    rules = descriptor.GetOptions().Extensions[policy_pb2.rules]
    groups = [list(group.fields) for group in rules.any_of]
    if rules.oneof_required:
        groups += [[field.name for field in choice.fields] for choice in descriptor.oneofs if len(choice.fields) > 1]
    for group in groups:
        if not set_names.intersection(group):
            yield f"Give {' or '.join(map(option_name, group))}."
    field: Any  # the stubs know two classes of it, which are one
    for field in descriptor.fields:
        if field.message_type is not None and not field.is_repeated:
            if field.name in set_names:
                yield from _missing(getattr(message, field.name), (*path, field), names)
        elif _bounds(field).required and field.name not in set_names:
            yield f"Give {names[(*path, field)]}."


def _bounds(field: FieldDescriptor) -> policy_pb2.Bounds:
    return field.GetOptions().Extensions[policy_pb2.bounds]
