"""Read the annotations of fields: the plain type, the choices of a Literal, and the bounds."""

import contextlib
import dataclasses
import functools
import operator
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from jaxgrpo.config.bounds import Bound


def is_record(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(record: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields that the caller of its class sets. Fields that the class fills in itself
    are not settings."""
    return [field for field in dataclasses.fields(record) if field.init]


def hints(kind: type) -> dict[str, Any]:
    """Return the annotations of a dataclass by field. An annotation that cannot be read, such as a
    name imported only for type checkers, becomes Any."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except Exception:  # the edge to a user's class
        return {field.name: _hint(kind, field) for field in fields_of(kind)}


def _hint(kind: type, field: dataclasses.Field[Any]) -> Any:
    alone = types.SimpleNamespace(__annotations__={field.name: field.type})
    for base in kind.__mro__:  # any of them may define the field, with the names of its module
        with contextlib.suppress(Exception):
            names = vars(sys.modules[base.__module__])
            return typing.get_type_hints(alone, names, include_extras=True)[field.name]
    return Any


def plain(annotation: Any) -> Any:
    """Return the type alone: without bounds, and with str for a Literal of strings."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return plain(arguments[0])
    if origin is Literal and all(isinstance(choice, str) for choice in arguments):
        return str
    if is_union(annotation):
        return functools.reduce(operator.or_, map(plain, arguments))
    if _is_sequence(annotation):
        return tuple[plain(arguments[0]), ...]  # type: ignore[misc]
    return annotation


def type_name(kind: Any) -> str:
    """Return how messages and documentation call a plain type, e.g. `int or None`."""
    alternatives = typing.get_args(kind) if is_union(kind) else (kind,)
    names = [
        one.__name__ if isinstance(one, type) and not typing.get_args(one) else str(one)
        for one in alternatives
    ]
    return re.sub(r"[^\W\d]\w*\.", "", " or ".join(names).replace("NoneType", "None"))


def bounds_of(annotation: Any) -> list[Bound]:
    """Return the bounds of a field, or of its items if it holds a tuple."""
    return [bound for bound in _extras(annotation) if isinstance(bound, Bound)]


def is_marked(annotation: Any, marker: type) -> bool:
    """Return whether a field's annotation holds this marker class, e.g. Int64."""
    return any(extra is marker for extra in _extras(annotation))


def _extras(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for part in _parts(annotation):
        yield from _extras(part)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """Return the strings that a field, or each item of its tuple, may be; () for any string."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation) if plain(annotation) is str else ()
    parts = _parts(annotation)
    return () if str in parts else tuple(name for part in parts for name in choices_of(part))


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Return the annotations inside Annotated, a union, or a tuple of any length."""
    arguments = typing.get_args(annotation)
    if is_union(annotation):
        return arguments
    holds_one = typing.get_origin(annotation) is Annotated or _is_sequence(annotation)
    return arguments[:1] if holds_one else ()


def is_union(annotation: Any) -> bool:
    """Return whether an annotation is of the form `A | B`."""
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _is_sequence(annotation: Any) -> bool:
    of_any_length = typing.get_args(annotation)[1:] == (...,)
    return typing.get_origin(annotation) is tuple and of_any_length
