"""docs/telemetry.md names what operators can look for."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from scripts.local.layout import ROOT

DOCUMENT = (ROOT / "docs" / "telemetry.md").read_text()


def calls() -> Iterator[ast.Call]:
    for room in ("mesh", "services"):
        for path in (ROOT / room).rglob("*.py"):
            yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def keys(argument: str) -> set[str]:
    """Return the literal keys of what calls are given as `argument`."""
    return {
        key.value
        for call in calls()
        for keyword in call.keywords
        if keyword.arg == argument
        for node in ast.walk(keyword.value)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def test_every_field_of_a_log_line_is_documented():
    fields = keys("extra")

    assert "task_id" in fields
    assert {field for field in fields if f"`{field}`" not in DOCUMENT} == set()


def test_every_attribute_of_a_span_is_documented():
    attributes = keys("attributes")

    assert "rpc.method" in attributes
    assert {attribute for attribute in attributes if f"`{attribute}`" not in DOCUMENT} == set()
