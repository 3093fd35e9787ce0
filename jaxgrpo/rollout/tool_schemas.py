"""Check the JSON schemas of tools, as far as chat templates and tool calls need them.

Source: JSON Schema, draft 2020-12. Like the standard, this allows unknown keywords.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_BY_NAME = ("properties", "$defs", "definitions", "patternProperties")
_FEW, _SHORT = 8, 100
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def schema_problems(tool: Mapping[str, Any]) -> list[str]:
    """Return a line for each fault in a tool's schema, e.g. `tool 'ls': parameters.properties.path:
    type must be one of ..., got 'str'`."""
    function = tool.get("function", tool)
    parameters = function.get("parameters", {})
    faults = list(_faults(parameters, "parameters"))
    if parameters and parameters.get("type", "object") != "object":
        wanted = "type must be 'object', whose properties are the arguments"
        faults.append(f"parameters: {wanted}, got {parameters['type']!r}")
    return [f"tool {function['name']!r}: {fault}" for fault in faults]


def undescribed(tool: Mapping[str, Any]) -> bool:
    """Return whether a tool has no description."""
    return not tool.get("function", tool).get("description")


def _faults(schema: Any, at: str) -> Iterator[str]:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield f"{at} must be a schema, a dict, got {schema!r}"
        return
    yield from _faulty_type(schema, at)
    yield from _faulty_required(schema, at)
    if "enum" in schema and (not isinstance(schema["enum"], list) or not schema["enum"]):
        yield f"{at}: enum must be a list with at least one value, got {schema['enum']!r}"
    for key in (*_NUMBERS, *_COUNTS):
        value = schema.get(key, 0)
        wanted = (int,) if key in _COUNTS else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            yield f"{at}: {key} must be a number, got {value!r}"
    yield from _faults_inside(schema, at)


def _faulty_type(schema: Mapping[str, Any], at: str) -> Iterator[str]:
    if "type" not in schema:
        return
    given = schema["type"]
    several = isinstance(given, list) and given
    for name in given if several else [given]:
        if name not in TYPES:
            yield f"{at}: type must be one of {', '.join(TYPES)}, got {name!r}"


def _faulty_required(schema: Mapping[str, Any], at: str) -> Iterator[str]:
    required, properties = schema.get("required", []), schema.get("properties", {})
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        yield f"{at}: required must be a list of names, got {required!r}"
    elif isinstance(properties, dict):
        missing = [name for name in required if name not in properties]
        if missing:
            yield f"{at}: required names {missing[0]!r}, which is not among the properties"


def _faults_inside(schema: Mapping[str, Any], at: str) -> Iterator[str]:
    for key in _SCHEMAS:
        if key in schema:
            yield from _faults(schema[key], f"{at}.{key}")
    for key in _LISTS:
        parts = schema.get(key, ())
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            yield f"{at}: {key} must be a list of schemas, got {parts!r}"
            continue
        for i, part in enumerate(parts):
            yield from _faults(part, f"{at}.{key}[{i}]")
    for key in _BY_NAME:
        named = schema.get(key, {})
        if not isinstance(named, dict):
            yield f"{at}: {key} must be a dict of schemas, got {named!r}"
            continue
        for name, part in named.items():
            yield from _faults(part, f"{at}.{key}.{name}")


def example(schema: Any) -> Any:
    """Return a small value that fits an ordinary schema, of which `schema_problems` finds nothing.

    >>> example({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    {'n': 1}
    """
    if not isinstance(schema, dict):
        return "a"
    for key in ("const", "default"):
        if schema.get(key) is not None:
            return schema[key]
    for key in ("enum", "examples", "anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list) and choices:
            return choices[0] if key in ("enum", "examples") else example(choices[0])
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example(properties.get(name)) for name in schema.get("required", ())}
    if kind == "array":
        return [example(schema.get("items"))] * min(schema.get("minItems", 1), _FEW)
    plain = {"boolean": True, "null": None, "number": 1, "integer": 1}
    if kind in ("number", "integer"):
        return schema.get("minimum", plain[kind])
    return plain.get(kind, "a" * min(max(1, schema.get("minLength", 1)), _SHORT))
