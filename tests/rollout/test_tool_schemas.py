"""Which schemas of tools are refused, and which values are made up for them."""

from typing import Any

import pytest

from jaxgrpo.rollout.tool_schemas import example, schema_problems

SOUND: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 2},
        "lines": {"type": ["integer", "null"], "minimum": 3},
        "mode": {"enum": ["r", "w"]},
        "tags": {"type": "array", "items": {"type": "boolean"}},
        "place": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/point"}], "x-note": "any"},
    },
    "required": ["path", "lines", "mode", "tags", "place"],
    "$defs": {"point": {"type": "object", "additionalProperties": False}},
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"type": "array"}, "parameters: type must be 'object', whose properties are the"),
        ({"type": "dict"}, "parameters: type must be one of array, boolean, "),
        ({"type": []}, "got []"),
        ({"required": ["path", "size"]}, "parameters: required names 'size', which is not among"),
        ({"required": "path"}, "parameters: required must be a list of names, got 'path'"),
        (
            {"properties": ["path"]},
            "properties must be a dict of schemas, got ['path']",
        ),
        ({"properties": {"a": "str"}, "required": []}, "parameters.properties.a must be a schema"),
        ({"$defs": {"p": {"enum": []}}}, "parameters.$defs.p: enum must be a list with at least"),
        ({"anyOf": {"type": "string"}}, "parameters: anyOf must be a list of schemas, got {"),
        (
            {"allOf": [{}, {"items": 3}]},
            "allOf[1].items must be a schema, a dict, got 3",
        ),
        ({"minProperties": "2"}, "parameters: minProperties must be a number, got '2'"),
        ({"maxItems": 1.5}, "parameters: maxItems must be a number, got 1.5"),
    ],
)
def test_what_is_no_schema_is_told(change: dict[str, Any], told: str) -> None:
    for tool in (
        {"name": "read", "parameters": SOUND | change},
        {"type": "function", "function": {"name": "read", "parameters": SOUND | change}},
    ):
        problems = schema_problems(tool)
        assert [one for one in problems if one.startswith("tool 'read': ") and told in one]


@pytest.mark.parametrize("tool", [{"name": "f"}, {"name": "f", "parameters": SOUND}])
def test_a_schema_is_sound(tool: dict[str, Any]) -> None:
    assert schema_problems(tool) == []


def test_made_up_arguments_fit() -> None:
    made = example(SOUND)
    assert made == {"path": "aa", "lines": 3, "mode": "r", "tags": [True], "place": 1}
    assert example({"type": "null"}) is None and example({"default": "x"}) == "x"
    assert example({"type": "object"}) == {} and example(None) == "a"
