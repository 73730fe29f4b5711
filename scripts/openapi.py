"""Writes the contracts' HTTP side as an OpenAPI 3.1 document. Run by `scripts/protos`.

What the proto3 JSON mapping says holds: lowerCamelCase, 64-bit integers as strings, enums by name, times as RFC 3339.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atelier.policy.v1 import policy_pb2
from atelier_client.comments import comments
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet

from mesh import VERSION
from mesh.contract import Contract, HttpRule, Method

Schema = dict[str, Any]

_F = FieldDescriptorProto
_HTTP_BODY = "google.api.HttpBody"
_INTEGER: Schema = {"type": "integer", "format": "int32"}
_LONG: Schema = {"type": "string", "format": "int64", "pattern": "^-?[0-9]+$"}
_NUMBER: Schema = {"type": "number", "format": "double"}
_SCALARS: dict[int, Schema] = {
    _F.TYPE_INT32: _INTEGER,
    _F.TYPE_UINT32: _INTEGER,
    _F.TYPE_INT64: _LONG,
    _F.TYPE_UINT64: _LONG,
    _F.TYPE_DOUBLE: _NUMBER,
    _F.TYPE_FLOAT: _NUMBER,
    _F.TYPE_BOOL: {"type": "boolean"},
    _F.TYPE_STRING: {"type": "string"},
    _F.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": "^-?[0-9]+(\\.[0-9]+)?s$"},
    "google.protobuf.FieldMask": {"type": "string", "description": "Names of fields, with commas between."},
}
_ACCESS = {
    "PUBLIC": "Needs no token.",
    "USER": "Needs an access token.",
    "ADMIN": "Needs an administrator's access token.",
}
_REQUEST_ID_HEADER: Schema = {"description": "What the server's logs call the request.", "schema": {"type": "string"}}
_REFUSAL: Schema = {
    "type": "object",
    "description": "google.rpc.Status: why the request was refused.",
    "required": ["code", "message", "details"],
    "properties": {
        "code": {"type": "integer", "format": "int32", "description": "google.rpc.Code."},
        "message": {"type": "string", "description": "One sentence for people."},
        "details": {
            "type": "array",
            "description": "One google.rpc.ErrorInfo; google.rpc.BadRequest and RetryInfo where they apply.",
            "items": {
                "type": "object",
                "required": ["@type"],
                "properties": {
                    "@type": {"type": "string"},
                    "reason": {"type": "string", "description": "For programs, e.g. TASK_NOT_FOUND."},
                    "domain": {"type": "string", "description": "`atelier`."},
                    "metadata": {
                        "type": "object",
                        "additionalProperties": {"type": "string"},
                        "description": "The values that the message mentions.",
                    },
                },
                "additionalProperties": True,
            },
        },
    },
}


def document(image: bytes) -> dict[str, Any]:
    """Return the OpenAPI document of every rpc in `image` that people may call over HTTP.

    Raises:
        ValueError: an rpc cannot be said in HTTP as its contract puts it.
    """
    return _Writer(FileDescriptorSet.FromString(image), Contract.from_image(image)).document()


class _Writer:
    def __init__(self, files: FileDescriptorSet, contract: Contract) -> None:
        self._contract = contract
        self._comments = comments(files)
        self._types: dict[str, DescriptorProto | EnumDescriptorProto] = {}
        for file in files.file:
            self._index(file.package, file.message_type, file.enum_type)
        self._services = {
            f"{file.package}.{service.name}": file.package.split(".")[1]
            for file in files.file
            if file.package.startswith("atelier.")
            for service in file.service
        }
        self._schemas: dict[str, Schema] = {}

    def _index(self, scope: str, messages: Any, enums: Any) -> None:
        for message in messages:
            self._types[f"{scope}.{message.name}"] = message
            self._index(f"{scope}.{message.name}", message.nested_type, message.enum_type)
        for enum in enums:
            self._types[f"{scope}.{enum.name}"] = enum

    def document(self) -> dict[str, Any]:
        methods = [
            (method, method.http)
            for method in self._contract.methods.values()
            if method.http is not None and method.access != "SERVICE"
        ]
        paths: dict[str, dict[str, Any]] = {}
        for method, rule in methods:
            path = re.sub(r"{([^}]+)}", lambda found: f"{{{_camel(found[1].split('.')[-1])}}}", rule.path)
            paths.setdefault(path, {})[rule.verb.lower()] = self._operation(method, rule)
        used = {method.service for method, _ in methods}
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "Atelier",
                "version": VERSION,
                "description": "Accounts, files and durable media tasks. Every answer carries `x-request-id`.",
            },
            "servers": [{"url": "/"}],
            "tags": [
                {"name": tag, "description": self._comments.get(service, "")}
                for service, tag in sorted(self._services.items())
                if service in used
            ],
            "paths": dict(sorted(paths.items())),
            "components": {
                "schemas": {**dict(sorted(self._schemas.items())), "Refusal": _REFUSAL},
                "responses": {
                    "Refusal": {
                        "description": "The request was refused.",
                        "headers": {
                            "x-request-id": _REQUEST_ID_HEADER,
                            "retry-after": {
                                "description": "When trying again may help, seconds.",
                                "schema": {"type": "integer"},
                            },
                        },
                        "content": {"application/json": {"schema": _reference("schemas", "Refusal")}},
                    }
                },
                "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            },
        }

    def _operation(self, method: Method, rule: HttpRule) -> dict[str, Any]:
        name = method.full_name.split("/")[-1]
        comment = self._comments.get(f"{method.service}.{name}", "")
        operation: dict[str, Any] = {
            "operationId": name,
            "tags": [self._services[method.service]],
            "summary": comment.partition(". ")[0].rstrip("."),
            "description": f"{comment} {_ACCESS[method.access]}".strip(),
            "security": [] if method.access == "PUBLIC" else [{"bearer": []}],
            "x-atelier-policy": {
                "access": method.access,
                "rateClass": method.rate_class,
                "maxRequestBytes": method.max_request_bytes,
                "deadlineSeconds": method.deadline_seconds,
                "audited": method.audited,
            },
        }
        if parameters := list(self._parameters(method, rule)):
            operation["parameters"] = parameters
        if rule.body:
            operation["requestBody"] = self._body(method, rule)
        operation["responses"] = {**self._answers(method), "default": _reference("responses", "Refusal")}
        return operation

    def _parameters(self, method: Method, rule: HttpRule) -> Iterator[dict[str, Any]]:
        variables = re.findall(r"{([^}]+)}", rule.path)
        for variable in variables:
            owner, field = self._field(method.request_type, variable)
            yield {**self._parameter(owner, field), "in": "path", "required": True}
        request = self._message(method.request_type)
        names = {field.name for field in request.field}
        if rule.body != "*":
            for field in request.field:
                # An upload's own listener takes the key from the header alone.
                if field.name not in (*variables, rule.body) and not (method.bytes and field.name == "request_id"):
                    yield {**self._parameter(method.request_type, field), "in": "query"}
        if "request_id" in names:
            text = self._comments.get(f"{method.request_type}.request_id", "")
            yield {"name": "Idempotency-Key", "in": "header", "description": text, "schema": {"type": "string"}}

    def _parameter(self, owner: str, field: FieldDescriptorProto) -> dict[str, Any]:
        schema = self._property(owner, field)
        if "$ref" in schema and isinstance(self._types[field.type_name.lstrip(".")], DescriptorProto):
            raise ValueError(f"{owner}.{field.name} is a message and cannot be a parameter of a URL")
        description = schema.pop("description", "")
        required = field.options.Extensions[policy_pb2.bounds].required
        parameter = {"name": field.json_name, "description": description, "schema": schema}
        return {**parameter, "required": True} if required else parameter

    def _body(self, method: Method, rule: HttpRule) -> dict[str, Any]:
        description = f"At most {method.max_request_bytes:,} bytes."
        if rule.body == "*":
            variables = set(re.findall(r"{([^}]+)}", rule.path))
            schema = self._body_schema(method.request_type, variables)
            whole = self._schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
            return {
                "description": description,
                "required": bool(whole.get("required")),
                "content": {"application/json": {"schema": schema}},
            }
        _, field = self._field(method.request_type, rule.body)
        kind = field.type_name.lstrip(".")
        content = {"*/*": {}} if kind == _HTTP_BODY else {"application/json": {"schema": self._reference(kind)}}
        return {"description": description, "required": True, "content": content}

    def _body_schema(self, request_type: str, variables: set[str]) -> Schema:
        """Return the whole request, less what stands in the path."""
        if not variables:
            return self._reference(request_type)
        schema = self._object(request_type)
        left_out = {_camel(variable) for variable in variables}
        schema["properties"] = {name: each for name, each in schema["properties"].items() if name not in left_out}
        required = [name for name in schema.pop("required", []) if name not in left_out]
        return {**schema, "required": required} if required else schema

    def _answers(self, method: Method) -> dict[str, Any]:
        headers = {"x-request-id": _REQUEST_ID_HEADER}
        if method.response_type != _HTTP_BODY:
            content: dict[str, Any] = {"application/json": {"schema": self._reference(method.response_type)}}
            comment = self._comments.get(method.response_type, "")
            return {"200": {"description": comment or "Done.", "headers": headers, "content": content}}
        if method.server_streaming:
            content = {"text/event-stream": {"schema": {"type": "string"}}}
            return {"200": {"description": "Server-sent events.", "headers": headers, "content": content}}
        content = {"*/*": {}}
        return {
            "200": {"description": "The bytes.", "headers": headers, "content": content},
            "206": {"description": "The range that was asked for (RFC 9110).", "headers": headers, "content": content},
            "304": {"description": "What `If-None-Match` names is still so.", "headers": headers},
        }

    def _reference(self, full_name: str) -> Schema:
        """Return a reference to a type, which thereby stands in the document."""
        name = full_name.split(".v1.", 1)[-1]
        if name not in self._schemas:
            self._schemas[name] = {}  # first, for a type may hold itself
            kind = self._types[full_name]
            schema = self._enum(full_name, kind) if isinstance(kind, EnumDescriptorProto) else self._object(full_name)
            self._schemas[name] = {**schema, "x-atelier-type": full_name}
        elif self._schemas[name] and self._schemas[name]["x-atelier-type"] != full_name:
            raise ValueError(f"{full_name} and {self._schemas[name]['x-atelier-type']} would both be called {name}")
        return _reference("schemas", name)

    def _enum(self, full_name: str, kind: EnumDescriptorProto) -> Schema:
        # A value's full name stands beside its enum's, not below it; its comment's path is below.
        lines = [f"- `{each.name}`: {self._comments.get(f'{full_name}.{each.name}', '')}" for each in kind.value]
        text = "\n".join([self._comments.get(full_name, ""), "", *lines]).strip()
        return {"type": "string", "enum": [each.name for each in kind.value], "description": text}

    def _object(self, full_name: str) -> Schema:
        message = self._message(full_name)
        schema: Schema = {"type": "object"}
        if comment := self._comments.get(full_name):
            schema["description"] = comment
        schema["properties"] = {field.json_name: self._property(full_name, field) for field in message.field}
        required = [field.json_name for field in message.field if field.options.Extensions[policy_pb2.bounds].required]
        if required:
            schema["required"] = required
        rules = message.options.Extensions[policy_pb2.rules]
        if rules.oneof_required:
            members = [field for field in message.field if field.HasField("oneof_index") and not field.proto3_optional]
            schema["oneOf"] = [{"required": [field.json_name]} for field in members]
        if rules.any_of:
            groups = [[{"required": [_camel(name)]} for name in group.fields] for group in rules.any_of]
            schema["allOf"] = [{"anyOf": group} for group in groups]
        return schema

    def _property(self, owner: str, field: FieldDescriptorProto) -> Schema:
        bounds: Any = field.options.Extensions[policy_pb2.bounds]
        schema = self._value(field)
        if bounds.pattern:
            schema["pattern"] = f"^(?:{bounds.pattern})$"
        if schema.get("type") in ("integer", "number"):
            whole = schema["type"] == "integer"
            for key, name in (("min", "minimum"), ("max", "maximum")):
                if bounds.HasField(key):
                    value = getattr(bounds, key)
                    schema[name] = int(value) if whole else value
        repeated = field.label == _F.LABEL_REPEATED
        if repeated:
            schema = {"type": "array", "items": schema}
        for key, name in (("min_length", "min"), ("max_length", "max")):
            if bounds.HasField(key):
                schema[f"{name}{'Items' if repeated else 'Length'}"] = getattr(bounds, key)
        comment = self._comments.get(f"{owner}.{field.name}", "")
        return {**schema, "description": comment} if comment else schema

    def _value(self, field: FieldDescriptorProto) -> Schema:
        name = field.type_name.lstrip(".")
        if field.type in _SCALARS:
            return dict(_SCALARS[field.type])
        if name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[name])
        kind = self._types[name]
        if isinstance(kind, DescriptorProto) and kind.options.map_entry:
            return {"type": "object", "additionalProperties": self._value(kind.field[1])}
        return self._reference(name)

    def _field(self, message: str, path: str) -> tuple[str, FieldDescriptorProto]:
        """Return the field that `path`, e.g. `user.user_id`, leads to, and the message that holds it."""
        first, _, rest = path.partition(".")
        field = next(field for field in self._message(message).field if field.name == first)
        return self._field(field.type_name.lstrip("."), rest) if rest else (message, field)

    def _message(self, full_name: str) -> DescriptorProto:
        message = self._types[full_name]
        if not isinstance(message, DescriptorProto):
            raise TypeError(f"{full_name} is an enum")
        return message


def _reference(section: str, name: str) -> Schema:
    return {"$ref": f"#/components/{section}/{name}"}


def _camel(name: str) -> str:
    return re.sub(r"_(.)", lambda found: found[1].upper(), name)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m scripts.openapi IMAGE OUTPUT", file=sys.stderr)
        return 2
    image, output = map(Path, arguments)
    output.write_text(json.dumps(document(image.read_bytes()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
