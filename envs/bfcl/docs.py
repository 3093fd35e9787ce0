"""How tools are described to the policy: whole documents, documents without their `response`, or one line a tool; or JSON schemas.

"article" is the whole document as the article's code words it: a description loses what the tools of its class repeat (all up to
"Tool description: "), and JSON has spaces and escapes, as `json.dumps` writes it by default.
"""

import json
from collections.abc import Sequence

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


def describe(documents: Sequence[dict], detail: str) -> str:
    """The documents as text, one tool a line."""
    if detail == "signatures":
        return "\n".join(signature(document) for document in documents)
    if detail == "article":
        return "\n".join(json.dumps(_trimmed(document, detail)) for document in documents)
    # Compact separators: a sixth fewer tokens.
    return "\n".join(
        json.dumps(_trimmed(document, detail), ensure_ascii=False, separators=(",", ":"))
        for document in documents
    )


def signature(document: dict) -> str:
    """One line: `tail(file_name: str, lines: int = 10)`. A list says what it holds; an optional argument shows its default."""
    parameters = document["parameters"]
    required = parameters.get("required", ())
    parts = []
    for name, schema in parameters.get("properties", {}).items():
        part = f"{name}: {_python_type(schema)}"
        parts.append(part if name in required else f"{part} = {_default(schema)}")
    return f"{document['name']}({', '.join(parts)})"


def schema(document: dict, detail: str) -> dict:
    """The tool in the form that chat templates take: `{"type": "function", "function": {...}}` with JSON schema types."""
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


def _trimmed(document: dict, detail: str) -> dict:
    if detail == "article":
        return {**document, "description": document["description"].rpartition(_REPEATED)[2]}
    return (
        {key: value for key, value in document.items() if key != "response"}
        if detail == "without_response"
        else document
    )


def _python_type(schema: dict) -> str:
    base = _PYTHON_TYPES.get(schema.get("type", ""), "any")
    items = schema.get("items")
    return f"{base}[{_python_type(items)}]" if base == "list" and isinstance(items, dict) else base


def _default(schema: dict) -> str:
    """The data writes "None" as a text; every other default is a value of its type."""
    default = schema.get("default")
    return "None" if default == "None" else repr(default)


def _json_schema(schema: dict, descriptions: bool) -> dict:
    """BFCL's schema dialect (`dict`, `float`, `tuple`) in JSON schema; defaults that are the text "None" are left out."""
    converted: dict = {}
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
