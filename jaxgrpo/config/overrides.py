"""Settings as frozen dataclasses within dataclasses: read by dotted key, changed by `a.b=value`, held to their annotated types. Pure."""

import ast
import contextlib
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

S = TypeVar("S")


def is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(record: Any) -> list[dataclasses.Field]:
    """The fields that its class is given: those that it fills in itself are no settings."""
    return [field for field in dataclasses.fields(record) if field.init]


def shown(value: Any, text: Callable[[Any], str] = repr) -> str:
    """Its repr, without addresses, which differ from process to process; and where it has none, the
    name of its class."""
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", text(value))
    except Exception:  # the edge to a user's class; and integers of thousands of digits have none
        return f"an object of {type(value).__qualname__}"


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, annotated type) of every field of a section and of its sections.

    Records in a tuple are sections beside it, under the names of their classes:
    `rewards.GibberishJudge.url` for a GibberishJudge among `rewards.functions`. Where a tuple holds
    two of one class they are none: the name would not tell them apart.
    """
    hints = _hints(type(section))
    for field in fields_of(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if is_record(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, hints[field.name]
            for name, record in _records(value).items():
                yield from leaves(record, f"{prefix}{name}.")


def _records(value: Any) -> dict[str, Any]:
    """The records in a tuple by the names of their classes, or none where a name occurs twice."""
    items = value if isinstance(value, tuple) else ()
    records = [item for item in items if is_record(item)]
    named = {type(record).__name__: record for record in records}
    return named if len(named) == len(records) else {}


def _hints(kind: type) -> dict[str, Any]:
    """The annotated types by field. One that cannot be read, such as a name that is imported for
    type checkers alone, may be anything."""
    try:
        return typing.get_type_hints(kind)
    except Exception:  # the edge to a user's class
        return {field.name: _hint(kind, field) for field in fields_of(kind)}


def _hint(kind: type, field: dataclasses.Field) -> Any:
    alone = types.SimpleNamespace(__annotations__={field.name: field.type})
    for base in kind.__mro__:  # the field may be of any, each with the names of its module
        with contextlib.suppress(Exception):
            return typing.get_type_hints(alone, vars(sys.modules[base.__module__]))[field.name]
    return Any


def overridden(config: S, overrides: Sequence[str]) -> tuple[S, list[str]]:
    """The config with all overrides applied together (a section is checked once, as a whole), and what was wrong with them."""
    kinds = {key: kind for key, _, kind in leaves(config)}
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, separator, text = (part.strip() for part in override.partition("="))
        inside = [known for known in kinds if known.startswith(f"{key}.")]
        if not separator or not key:
            problems.append(f"--set takes key=value, got {override!r}")
        elif inside:
            problems.append(f"{key!r} is a section: set one of its fields ({', '.join(inside)})")
        elif key not in kinds:
            problems.append(f"unknown setting {key!r}. {nearest(key, list(kinds))}")
        else:
            try:
                values[key] = _fit(_read(text, kinds[key]), kinds[key])
            except TypeError as error:
                problems.append(f"{key} {error}")
    config, refused = _replaced(config, values, "")
    return config, problems + refused


def _replaced(section: Any, values: Mapping[str, Any], prefix: str) -> tuple[Any, list[str]]:
    """The section with values by dotted key; what its own checks refuse is told, and left as it was."""
    changes, problems = {}, []
    for field in fields_of(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if key in values:
            changes[field.name] = values[key]
        elif any(name.startswith(f"{key}.") for name in values):
            changes[field.name], inner = _replaced(value, values, f"{key}.")
            problems += inner
        for kind, record in _records(value).items():
            if any(name.startswith(f"{prefix}{kind}.") for name in values):
                new, inner = _replaced(record, values, f"{prefix}{kind}.")
                problems += inner
                now = changes.get(field.name, value)
                changes[field.name] = tuple(new if item is record else item for item in now)
    try:
        return dataclasses.replace(section, **changes) if changes else section, problems
    except (ValueError, TypeError) as error:
        return section, [*problems, f"{prefix.rstrip('.') or 'the config'}: {error}"]


def nearest(key: str, keys: Sequence[str]) -> str:
    last = {known: known.rpartition(".")[2] for known in keys}
    name = key.rpartition(".")[2]
    similar = difflib.get_close_matches(name, last.values(), 1)
    close = [known for known in keys if last[known] == name] or difflib.get_close_matches(
        key, keys, 1, 0.7
    )
    close = close or [known for known in keys if last[known] in similar]
    section = [known for known in keys if known.startswith(key.partition(".")[0] + ".")]
    return f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(section or keys)}"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(kind)
        if typing.get_origin(kind) in (types.UnionType, typing.Union)
        else (kind,)
    )


def _read(text: str, kind: Any) -> Any:
    """The text of an override: as it stands for a str, otherwise a Python literal; names separated by commas for a tuple of names."""
    kinds = _alternatives(kind)
    words = {"true": True, "false": False, "none": None, "null": None}
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = words.get(text.lower(), text)
    if str in kinds and not isinstance(value, str) and not (value is None and type(None) in kinds):
        return text
    if isinstance(value, str) and any(
        typing.get_origin(k) is tuple and str in typing.get_args(k) for k in kinds
    ):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _fit(value: Any, kind: Any) -> Any:
    """`value` as the annotated type: an int for a float, a list for a tuple, nothing else. Raises TypeError that goes on after the key.

    Of types that are none of these (a user's environment may have any), only the class is compared.
    """
    for one in _alternatives(kind):
        origin, arguments = typing.get_origin(one), typing.get_args(one)
        if one is float and isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(value)
        if origin is tuple and isinstance(value, (tuple, list)) and arguments[1:] in ((), (...,)):
            items = tuple(_fit(item, arguments[0]) for item in value)
            fits = type(value) is tuple and all(a is b for a, b in zip(items, value))
            return value if fits else items
        if _matches(value, one):
            return value
    names = " or ".join(
        k.__name__ if isinstance(k, type) and not typing.get_args(k) else str(k)
        for k in _alternatives(kind)
    )
    raise TypeError(f"must be of type {names.replace('NoneType', 'None')}, got {shown(value)}")


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise TypeError(f"must be finite, got {shown(value)}")
    return number


def _matches(value: Any, kind: Any) -> bool:
    if kind in (int, bool):
        return type(value) is kind  # True is an int to isinstance
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    plain = typing.get_origin(kind) or kind
    return kind is Any or (isinstance(plain, type) and isinstance(value, plain))


def typed(config: S) -> tuple[S, list[str]]:
    """The config with every field in its type, or as it was, and the fields that cannot be brought to theirs."""
    values, problems = {}, []
    for key, value, kind in leaves(config):
        try:
            fitted = _fit(value, kind)
        except TypeError as error:
            problems.append(f"{key} {error}")
        else:
            if fitted is not value:
                values[key] = fitted
    return (config, problems) if problems else _replaced(config, values, "")
