"""Make tools from typed Python functions: a JSON schema for the model, and checked arguments.

pydantic derives both from the same annotations, so the model is told exactly what is accepted. The
descriptions come from the docstring, written in Google style:

    def stock_of(item: str, warehouse: Literal["north", "south"] = "north") -> int:
        \"\"\"Count an item in stock.

        Args:
            item: The name of the item.
            warehouse: Where to look.
        \"\"\"
"""

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import pydantic
from pydantic.json_schema import GenerateJsonSchema

from jaxgrpo import checked

MAX_FAULTS = 5
"""Most wrong arguments that one error result names."""

MAX_SHOWN = 100
"""Most characters of a wrong value that an error result repeats."""

Schema = dict[str, Any]

_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?|References):\s*"
)
_ARGUMENT = re.compile(r"\*{0,2}(\w+)(?:\s*\([^)]*\))?:\s*(.*)")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class ArgumentsError(ValueError):
    """Arguments do not fit a tool. The message is for the model: which, what was given, and what is
    expected."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool: its name, description and parameters (a JSON schema), and the function behind it.

    `bind` checks and converts arguments. `function` may be a coroutine function. `is_method` says
    that it wants the episode as its first argument.
    """

    name: str
    description: str
    parameters: Schema
    function: Callable[..., Any]
    bind: Callable[[Mapping[str, object]], dict[str, Any]]
    is_method: bool = False

    @property
    def schema(self) -> Schema:
        """Return the tool as chat templates take it."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


def tool_of(function: Callable[..., Any], is_method: bool = False) -> Tool:
    """Make a tool of a function. Raises TypeError, which names the function, if a parameter has no
    usable type or cannot be given by name, or if the docstring describes one that is not there."""
    name = getattr(function, "__name__", "")
    where = getattr(function, "__qualname__", checked.shorten_value(function))
    if not inspect.isroutine(function) or not name.isidentifier():
        raise TypeError(
            f"a tool must be a function with a name, got {checked.shorten_value(function)}"
        )
    signature = _signature(function, where, is_method)
    description, documented = read_docstring(inspect.getdoc(function) or "")
    unknown = [argument for argument in documented if argument not in signature.parameters]
    if unknown:
        has = ", ".join(signature.parameters) or "none"
        raise TypeError(
            f"the docstring of tool {where} describes {unknown[0]!r}; its arguments are: {has}"
        )
    adapter = _adapter(signature, documented, where)
    try:
        parameters = adapter.json_schema(schema_generator=_Untitled)
    except pydantic.errors.PydanticUserError as error:
        raise TypeError(f"tool {where} has no JSON schema: {_first_line(error)}") from error
    parameters = _arranged(parameters)

    def bind(arguments: Mapping[str, object]) -> dict[str, Any]:
        try:
            return adapter.validate_python(dict(arguments))
        except pydantic.ValidationError as error:
            raise ArgumentsError(_worded(error, name, parameters)) from None

    return Tool(name, description, parameters, function, bind, is_method)


def _signature(function: Callable[..., Any], where: str, is_method: bool) -> inspect.Signature:
    """Return the signature with resolved annotations, without `self`."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # the edge to a user's annotations
        raise TypeError(f"the annotations of tool {where} cannot be read: {error}") from error
    parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
    for parameter in parameters:
        if parameter.kind not in _NAMED:
            raise TypeError(
                f"tool {where} takes {parameter}: every argument needs a name of its own, because "
                "the model gives arguments by name"
            )
        if parameter.name not in hints:
            raise TypeError(
                f"argument {parameter.name!r} of tool {where} has no type: annotate it, such as "
                f"{parameter.name}: str. A public method is a tool; begin the name of any other "
                "with an underscore"
            )
    named = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in parameters
    ]
    return inspect.Signature(named)


def _adapter(
    signature: inspect.Signature, documented: Mapping[str, str], where: str
) -> pydantic.TypeAdapter[dict[str, Any]]:
    """Return pydantic's adapter of a function that has this signature and returns its arguments."""

    def arguments(**given: Any) -> dict[str, Any]:
        return given

    described = [
        parameter.replace(annotation=_described(parameter.annotation, documented.get(name)))
        for name, parameter in signature.parameters.items()
    ]
    seen: Any = arguments  # pydantic reads both attributes
    seen.__signature__ = signature.replace(parameters=described)
    seen.__annotations__ = {parameter.name: parameter.annotation for parameter in described}
    try:
        return pydantic.TypeAdapter(seen)
    except pydantic.errors.PydanticUserError as error:
        raise TypeError(f"tool {where} has a type without a schema: {_first_line(error)}") from None


def _described(annotation: Any, text: str | None) -> Any:
    return Annotated[annotation, pydantic.Field(description=text)] if text else annotation


class _Untitled(GenerateJsonSchema):
    """Leaves out titles, which repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _arranged(schema: Schema) -> Schema:
    """Return the schema of the arguments in the order in which models have seen such schemas:
    `type`, `properties`, `required`. Other arguments are refused without being told so."""
    properties = schema.get("properties", {})
    arranged = {"type": "object", "properties": {k: _type_first(v) for k, v in properties.items()}}
    rest = {k: v for k, v in schema.items() if k not in (*arranged, "additionalProperties")}
    return {**arranged, "required": rest.pop("required", []), **rest}


def _type_first(schema: Schema) -> Schema:
    first: Schema = {key: schema[key] for key in ("type", "description") if key in schema}
    return first | schema


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description of a Google-style docstring, and that of each argument.

    >>> read_docstring("Add.\\n\\nArgs:\\n    a: One,\\n        any.\\n    b (int): Another.")
    ('Add.', {'a': 'One, any.', 'b': 'Another.'})
    """
    lines = inspect.cleandoc(text).splitlines()
    heads = [i for i, line in enumerate(lines) if _SECTION.fullmatch(line)]
    description = "\n".join(lines[: heads[0] if heads else len(lines)]).strip()
    found: dict[str, str] = {}
    for head in heads:
        if lines[head].rstrip()[:-1] in ("Args", "Arguments", "Parameters"):
            found |= _entries(lines[head + 1 :])
    return description, found


def _entries(lines: Sequence[str]) -> dict[str, str]:
    """Read the entries of an argument section: the first indentation holds the names, deeper lines
    continue an entry, and a line that is not indented ends the section."""
    found: dict[str, str] = {}
    first = name = ""
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if not line.strip():
            continue
        if not indent:
            break
        first = first or indent
        entry = _ARGUMENT.fullmatch(line.strip()) if indent == first else None
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def signature_of(name: str, parameters: Schema) -> str:
    """Return one line, such as `stock_of(item: str, warehouse: "north" | "south" = "north")`."""
    required, definitions = parameters.get("required", ()), parameters.get("$defs", {})
    written = []
    for argument, schema in parameters.get("properties", {}).items():
        text = f"{argument}: {_type_name(schema, definitions)}"
        if argument not in required:
            default = json.dumps(schema.get("default"), ensure_ascii=False)
            text += f" = {default if 'default' in schema else '...'}"
        written.append(text)
    return f"{name}({', '.join(written)})"


_NAMES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "null"}


def _type_name(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        inner = definitions.get(name, {})
        return name if inner.get("type") == "object" else _type_name(inner, {})
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            names = [_type_name(option, definitions) for option in schema[key]]
            return " | ".join(dict.fromkeys(names))
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        return f"list[{_type_name(items, definitions)}]" if isinstance(items, dict) else "list"
    if kind == "object":
        return "object"
    return _NAMES.get(str(kind), "any")


def _worded(error: pydantic.ValidationError, name: str, parameters: Schema) -> str:
    """Word an error for the model: each wrong argument, what was given, and what is expected."""
    faults = error.errors(include_url=False, include_context=False)
    said = list(dict.fromkeys(_faults(faults)))
    more = [f"and {len(said) - MAX_FAULTS} more"] if len(said) > MAX_FAULTS else []
    listed = "; ".join([*said[:MAX_FAULTS], *more])
    return f"{listed}. Expected {signature_of(name, parameters)}"


def _faults(faults: Sequence[Any]) -> Iterator[str]:
    for fault in faults:
        place = checked.cut(".".join(map(str, fault["loc"])), MAX_SHOWN)
        if fault["type"].startswith("missing"):
            yield f"the argument {place!r} is missing"
        elif fault["type"].startswith("unexpected"):
            yield f"there is no argument {place!r}"
        else:
            given = checked.cut(_as_json(fault["input"]), MAX_SHOWN)
            expected = fault["msg"].removeprefix("Input should be ")
            yield f"the argument {place!r} is {given}, but should be {expected}"


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return checked.shorten_value(value)
