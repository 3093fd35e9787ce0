"""Read nested dataclasses by dotted key, change them by `a.b=value`, and check their types."""

import ast
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxgrpo.config.annotations import fields_of, hints, is_record, is_union, plain, type_name
from jaxgrpo.config.renamed import current_key
from jaxgrpo.extensions import SamplerFactory, import_object, is_import_path

S = TypeVar("S")


def describe_value(value: Any, text: Callable[[Any], str] = repr) -> str:
    """Return the repr without addresses, which differ between processes. If it has none, return the
    name of the class."""
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", text(value))
    except Exception:  # the edge to a user's class; and integers of thousands of digits have none
        return f"an object of {type(value).__qualname__}"


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, plain type) of every field of a section and of its sections."""
    for key, value, annotation in annotated(section, prefix):
        yield key, value, plain(annotation)


def annotated(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, annotation) of every field of a section and of its sections.

    A record in a tuple is reached by the name of its class: `rewards.GibberishJudge.url` for a
    GibberishJudge in `rewards.functions`. If a class occurs twice there, none of the tuple's
    records is reached.
    """
    annotations = hints(type(section))
    for field in fields_of(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if is_record(value):
            yield from annotated(value, f"{key}.")
        else:
            yield key, value, annotations[field.name]
            for name, record in _records(value).items():
                yield from annotated(record, f"{prefix}{name}.")


def _records(value: Any) -> dict[str, Any]:
    """Return the records in a tuple by the names of their classes, or none if a name repeats."""
    items = value if isinstance(value, tuple) else ()
    records = [item for item in items if is_record(item)]
    named = {type(record).__name__: record for record in records}
    return named if len(named) == len(records) else {}


def apply_overrides(config: S, overrides: Sequence[str]) -> tuple[S, list[str]]:
    """Return the config with all overrides applied together, and lines that say what was wrong with
    them. A section is made once, with all of its changes."""
    kinds = {key: kind for key, _, kind in leaves(config)}
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, separator, text = (part.strip() for part in override.partition("="))
        problem = "" if key in kinds else _unknown(key, list(kinds))
        if not separator or not key:
            problems.append(f"--set takes key=value, got {override!r}")
        elif problem:
            problems.append(problem)
        else:
            try:
                values[key] = _fit(_read(text, kinds[key]), kinds[key])
            except TypeError as error:
                problems.append(f"{key} {error}")
    config, refused = _replaced(config, values, "")
    return config, problems + refused


def _unknown(key: str, keys: Sequence[str]) -> str:
    """Return a line that says what to write in place of a key that is not a setting."""
    inside = [known for known in keys if known.startswith(f"{key}.")]
    if inside:
        return f"{key!r} is a section: set one of its fields ({', '.join(inside)})"
    now = current_key(key)
    if now != key:
        return f"{key!r} is now called {now!r}"
    return f"unknown setting {key!r}. {suggestion(key, keys)}"


def _replaced(section: Any, values: Mapping[str, Any], prefix: str) -> tuple[Any, list[str]]:
    """Return the section with these values by dotted key, and the errors of its own checks. A
    section with an error keeps its old values."""
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


def suggestion(key: str, keys: Sequence[str]) -> str:
    """Return a hint: the most similar key, or else all keys of the section."""
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
    return typing.get_args(kind) if is_union(kind) else (kind,)


def _read(text: str, kind: Any) -> Any:
    """Parse the text of an override: a Python literal, except that a str is taken as it is and a
    tuple of strings may be names separated by commas."""
    kinds = _alternatives(kind)
    words = {"true": True, "false": False, "none": None, "null": None}
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = words.get(text.lower(), text)
    if str in kinds and not isinstance(value, str) and not (value is None and type(None) in kinds):
        return text
    if isinstance(value, str) and any(
        typing.get_origin(k) is tuple
        and any(item is str or _is_extension(item) for item in typing.get_args(k))
        for k in kinds
    ):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _fit(value: Any, kind: Any) -> Any:
    """Convert a value to a type: an int to a float, a list to a tuple, an import path to the object
    that it names. Raise TypeError for any other type, with a message that continues after the key.

    For all other types, which a user's environment may have, only the class is compared.
    """
    if is_import_path(value) and any(map(_is_extension, _alternatives(kind))):
        try:
            value = import_object(value)
        except ValueError as error:
            raise TypeError(str(error)) from error
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
    raise TypeError(f"must be of type {type_name(kind)}, got {describe_value(value)}")


def _is_extension(kind: Any) -> bool:
    """Return whether values of a type may be given by import path."""
    return kind is SamplerFactory or typing.get_origin(kind) is Callable


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise TypeError(f"must be finite, got {describe_value(value)}")
    return number


def _matches(value: Any, kind: Any) -> bool:
    if kind in (int, bool):
        return type(value) is kind  # True is an int to isinstance
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    plain = typing.get_origin(kind) or kind
    return kind is Any or (isinstance(plain, type) and isinstance(value, plain))


def convert_types(config: S) -> tuple[S, list[str]]:
    """Return the config with every field converted to its type, and no problems. If any field has
    the wrong type, return the config as it was, and lines that say so."""
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
