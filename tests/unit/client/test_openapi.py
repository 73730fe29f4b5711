"""The OpenAPI document: what the specification (3.1) demands of its structure, and what our contracts say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mesh.contract import IMAGE, Contract, installed
from scripts.openapi import document

VERBS = {"get", "put", "post", "delete", "patch"}


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return document(IMAGE.read_bytes())


def operations(openapi: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in openapi["paths"].items():
        assert set(item) <= VERBS
        yield from ((path, operation) for operation in item.values())


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for each in value.values():
            yield from nodes(each)
    elif isinstance(value, list):
        for each in value:
            yield from nodes(each)


def test_it_is_the_one_that_is_committed(openapi: dict[str, Any]) -> None:
    assert json.loads((IMAGE.parent / "openapi.json").read_text()) == openapi


def test_its_root_has_what_the_specification_requires(openapi: dict[str, Any]) -> None:
    assert openapi["openapi"].startswith("3.1.")
    assert {"title", "version"} <= set(openapi["info"])
    assert set(openapi) <= {"openapi", "info", "servers", "tags", "paths", "components"}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in openapi["components"]["schemas"])


def test_every_reference_leads_somewhere(openapi: dict[str, Any]) -> None:
    references = {node["$ref"] for node in nodes(openapi) if "$ref" in node}

    for reference in references:
        found: Any = openapi
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert found


def test_every_type_is_used(openapi: dict[str, Any]) -> None:
    references = {node["$ref"].rpartition("/")[2] for node in nodes(openapi) if "$ref" in node}

    assert set(openapi["components"]["schemas"]) <= references


def test_path_variables_are_declared_and_nothing_else_is(openapi: dict[str, Any]) -> None:
    for path, operation in operations(openapi):
        declared = [each["name"] for each in operation.get("parameters", []) if each["in"] == "path"]
        assert sorted(declared) == sorted(re.findall(r"{([^}]+)}", path))
        assert all(each["required"] for each in operation.get("parameters", []) if each["in"] == "path")


def test_parameters_are_unique_and_complete(openapi: dict[str, Any]) -> None:
    for _, operation in operations(openapi):
        parameters = operation.get("parameters", [])
        assert len({(each["in"], each["name"]) for each in parameters}) == len(parameters)
        assert all(each["schema"] and each["in"] in ("path", "query", "header") for each in parameters)


def test_every_operation_has_a_name_of_its_own_answers_and_a_description(openapi: dict[str, Any]) -> None:
    found = [operation for _, operation in operations(openapi)]

    assert len({operation["operationId"] for operation in found}) == len(found)
    for operation in found:
        assert operation["summary"]
        assert {"200", "default"} <= set(operation["responses"])
        assert set(operation["tags"]) <= {tag["name"] for tag in openapi["tags"]}


def test_every_open_rpc_is_there_and_no_internal_one(openapi: dict[str, Any]) -> None:
    methods = installed().methods.values()
    open_rpcs = {each.full_name.split("/")[-1] for each in methods if each.http and each.access != "SERVICE"}

    assert {operation["operationId"] for _, operation in operations(openapi)} == open_rpcs
    assert not any(path.startswith("/internal") for path in openapi["paths"])


def test_access_is_the_policys(openapi: dict[str, Any]) -> None:
    policies = {
        each.full_name.split("/")[-1]: each for each in Contract.from_image(IMAGE.read_bytes()).methods.values()
    }

    for _, operation in operations(openapi):
        policy = policies[operation["operationId"]]
        assert operation["security"] == ([] if policy.access == "PUBLIC" else [{"bearer": []}])
        assert operation["x-atelier-policy"]["maxRequestBytes"] == policy.max_request_bytes


def test_names_are_those_of_json(openapi: dict[str, Any]) -> None:
    for schema in openapi["components"]["schemas"].values():
        assert not any("_" in name for name in schema.get("properties", {}))


def test_values_are_those_of_the_json_mapping(openapi: dict[str, Any]) -> None:
    file = openapi["components"]["schemas"]["File"]["properties"]
    task = openapi["components"]["schemas"]["Task"]["properties"]

    assert (file["sizeBytes"]["type"], file["sizeBytes"]["format"]) == ("string", "int64")
    assert (file["createTime"]["type"], file["createTime"]["format"]) == ("string", "date-time")
    assert task["outputFileIds"]["type"] == "array"
    assert "STATE_QUEUED" in openapi["components"]["schemas"]["Task.State"]["enum"]


def test_bounds_are_the_contracts(openapi: dict[str, Any]) -> None:
    resize = openapi["components"]["schemas"]["Resize"]

    assert (resize["properties"]["width"]["minimum"], resize["properties"]["width"]["maximum"]) == (1, 16384)
    assert resize["allOf"] == [{"anyOf": [{"required": ["width"]}, {"required": ["height"]}]}]
    assert openapi["components"]["schemas"]["CreateTaskRequest"]["required"] == ["inputFileId", "operation"]


def test_bytes_are_bytes_and_a_watch_is_an_event_stream(openapi: dict[str, Any]) -> None:
    upload = openapi["paths"]["/api/v1/files"]["post"]
    watch = openapi["paths"]["/api/v1/tasks/{taskId}:watch"]["get"]

    assert upload["requestBody"]["content"] == {"*/*": {}}
    assert [each["name"] for each in upload["parameters"]] == ["name", "Idempotency-Key"]
    assert list(watch["responses"]["200"]["content"]) == ["text/event-stream"]


def test_a_request_less_its_path_is_its_body(openapi: dict[str, Any]) -> None:
    set_role = openapi["paths"]["/api/v1/users/{userId}/role:set"]["post"]

    schema = set_role["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"role", "status"}


def test_a_refusal_has_the_shape_of_error_info(openapi: dict[str, Any]) -> None:
    refusal = openapi["components"]["schemas"]["Refusal"]

    assert refusal["required"] == ["code", "message", "details"]
    assert {"reason", "domain", "metadata"} <= set(refusal["properties"]["details"]["items"]["properties"])
