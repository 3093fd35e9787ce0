"""Describe tools to the policy, as text or as JSON schemas.

Text is the whole documents ("full"), documents without their `response` ("without_response"), or
one line per tool ("signatures"). "article" is the whole document as the article's code words it. It
drops the start that all descriptions of a class have in common (up to "Tool description: "), and
writes JSON with spaces and escapes, as `json.dumps` does by default.
"""

import json
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
"""A tool's document in the data: name, description, parameters, response."""

DETAILS = ("full", "article", "without_response", "signatures")
_REPEATED = "Tool description: "

_PYTHON_TYPES = {
    "string": "str",
    "integer": "int",
    "float": "float",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "dict": "dict",
}
_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def describe(documents: Sequence[Document], detail: str) -> str:
    """Return the documents as text, one tool per line."""
    if detail == "signatures":
        return "\n".join(signature(document) for document in documents)
    if detail == "article":
        return "\n".join(json.dumps(_trimmed(document, detail)) for document in documents)
    # Compact separators: a sixth fewer tokens.
    return "\n".join(
        json.dumps(_trimmed(document, detail), ensure_ascii=False, separators=(",", ":"))
        for document in documents
    )


def signature(document: Document) -> str:
    """Return one line, such as `tail(file_name: str, lines: int = 10)`.

    Lists show the type of their items, and optional arguments their default.
    """
    parameters = document["parameters"]
    required = parameters.get("required", ())
    parts = []
    for name, schema in parameters.get("properties", {}).items():
        part = f"{name}: {_python_type(schema)}"
        parts.append(part if name in required else f"{part} = {_default(schema)}")
    return f"{document['name']}({', '.join(parts)})"


def schema(document: Document, detail: str) -> Document:
    """Return the tool as chat templates take it: `{"type": "function", "function": {...}}`.

    Types are those of JSON schema.
    """
    document = _trimmed(document, detail)
    function = {"name": document["name"]}
    if detail != "signatures":
        function["description"] = document["description"]
    function["parameters"] = _json_schema(
        document["parameters"], descriptions=detail != "signatures"
    )
    if detail in ("full", "article"):
        function["response"] = _json_schema(document["response"], descriptions=True)
    return {"type": "function", "function": function}


def _trimmed(document: Document, detail: str) -> Document:
    if detail == "article":
        return {**document, "description": document["description"].rpartition(_REPEATED)[2]}
    return (
        {key: value for key, value in document.items() if key != "response"}
        if detail == "without_response"
        else document
    )


def _python_type(schema: Document) -> str:
    base = _PYTHON_TYPES.get(schema.get("type", ""), "any")
    items = schema.get("items")
    return f"{base}[{_python_type(items)}]" if base == "list" and isinstance(items, dict) else base


def _default(schema: Document) -> str:
    """Return the default as Python writes it. The data has None as the text "None"."""
    default = schema.get("default")
    return "None" if default == "None" else repr(default)


def _json_schema(schema: Document, descriptions: bool) -> Document:
    """Convert BFCL's types (`dict`, `float`, `tuple`) to JSON schema, without defaults "None"."""
    converted: Document = {}
    for key, value in schema.items():
        if key == "type":
            if value != "any":
                converted["type"] = _SCHEMA_TYPES.get(value, value)
        elif key == "properties":
            converted["properties"] = {
                name: _json_schema(child, descriptions) for name, child in value.items()
            }
        elif key == "items" and isinstance(value, dict):
            converted["items"] = _json_schema(value, descriptions)
        elif (key == "description" and not descriptions) or (key == "default" and value == "None"):
            continue
        else:
            converted[key] = value
    return converted
