"""Schemas that would hurt the grammar engine never reach it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from bodies_table import LIST, ROUND, SCHEMA, chain

from hmc.errors import UsageError
from hmc.serve import schemas


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def _links(links: int) -> dict[str, Any]:
    """References straight to references."""
    found: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(links)}
    return {"$ref": "#/$defs/a0", "$defs": {**found, f"a{links}": {"type": "integer"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        SCHEMA,
        LIST,
        chain(100),
        chain(5, circle=True),
        _links(200),
        _nested(400),
        {"enum": ["x"] * 100_000},
        {"const": {"$ref": "#/nowhere"}},
        {"properties": {"$ref": {"type": "string"}, "enum": {"type": "null"}}},
        {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {}}},
        {"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/0"}]},
        {"properties": {"a": {"$ref": "#/$defs/any"}}, "$defs": {"any": True}},
    ],
)
def test_these_are_taken(schema: dict[str, Any]) -> None:
    schemas.check(schema)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (ROUND, "leads back to itself"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "leads back to itself"),
        (chain(1000), "levels"),
        (chain(1000, circle=True), "levels"),
        (_links(1000), "levels"),
        (_nested(2000), "levels"),
        ({"properties": {f"p{i}": {} for i in range(5001)}}, "objects and arrays"),
        ({"$ref": "#/$defs/a"}, "leads nowhere"),
        ({"$ref": "#/items/0", "items": []}, "leads nowhere"),
        ({"$ref": "#/properties/a", "properties": {"a": 5}}, "leads nowhere"),
        ({"$ref": "other.json"}, "no way within it"),
    ],
)
def test_these_are_refused(schema: dict[str, Any], why: str) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match=why):
        schemas.check(schema)
    assert time.monotonic() - began < 5
