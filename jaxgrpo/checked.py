"""Check values from users' code when they enter the records of `types.py` and `environment.py`.

Each function returns the value as exactly the built-in type that it names: it converts NumPy
numbers, lists and derived classes. The results can be compared, recorded and averaged without
running the users' code. For all other values it raises TypeError or ValueError with one line.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

MAX_MAGNITUDE = 1e12
"""Largest reward, and largest part of one. Larger numbers lose their fourth decimal in float64, and
gradients that they multiply may overflow float32 when they are squared."""

MAX_NAME = 500
"""Most characters of a name."""

MAX_ENTRIES = 1_000
"""Most entries of one mapping, and most stop strings of one observation."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shorten_value(value: object) -> str:
    """Return a short repr for error messages, also of huge objects and of those without a repr."""
    try:
        return _SHORT.repr(value)
    except Exception:  # a user's __repr__, or Python's limit on digits
        return f"<{type(value).__name__} that cannot be printed>"


def cut(text: str, most: int) -> str:
    """Shorten a string to at most `most` characters, and mark where it was cut."""
    if len(text) <= most:
        return text
    mark = f"... ({len(text)} characters)"
    return text[: max(0, most - len(mark))] + mark


def text(value: object, what: str) -> str:
    """Return a str, also from a derived class."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, got {shorten_value(value)}")
    return str.__str__(value)


def name(value: object, what: str) -> str:
    """Return a name: a printable str on one line, which is not empty."""
    plain = text(value, what)
    if not plain or len(plain) > MAX_NAME or not plain.isprintable():
        raise ValueError(
            f"{what} must be 1 to {MAX_NAME} printable characters, got {shorten_value(plain)}"
        )
    return plain


def number(value: object, what: str) -> float:
    """Return a number as a float, of a size up to `MAX_MAGNITUDE`."""
    if not isinstance(value, Real | np.bool_):
        raise TypeError(f"{what} must be a finite number, got {shorten_value(value)}")
    try:
        plain = float(value)
    except OverflowError:
        plain = math.inf
    if not abs(plain) <= MAX_MAGNITUDE:
        raise ValueError(
            f"{what} must be a finite number from -{MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}, "
            f"got {shorten_value(value)}"
        )
    return plain


def flag(value: object, what: str) -> bool:
    """Return True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{what} must be True or False, got {shorten_value(value)}")
    return bool(value)


def items(value: object, what: str, most: int | None = None) -> tuple[Any, ...]:
    """Return a tuple or list as a tuple. A str is refused, because it would become its letters, and
    a set, because it has no order."""
    if not isinstance(value, tuple | list):
        such = f" such as ({shorten_value(value)},)" if isinstance(value, str) else ""
        raise TypeError(f"{what} must be a tuple{such}, got {shorten_value(value)}")
    if most is not None and len(value) > most:
        raise ValueError(f"{what} must be at most {most}, got {len(value)}")
    return tuple(value)


def record(value: object, kind: type[T], what: str) -> T:
    """Return a record of a dataclass. A record of a derived class, which may lack the checks, is
    copied into one of `kind`."""
    if type(value) is kind:
        return value
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be of type {kind.__name__}, got {shorten_value(value)}")
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: getattr(value, field.name) for field in fields})


def numbers(value: object, what: str) -> dict[str, float]:
    """Return numbers by name as a dict."""
    pairs = items(_pairs(value, what), what, MAX_ENTRIES)
    return {
        name(key, f"a name in {what}"): number(item, f"{what}[{shorten_value(key)}]")
        for key, item in pairs
    }


def notes(value: object, what: str, most: int) -> dict[str, str]:
    """Return strings by name as a dict.

    It keeps at most `most` characters of each, and the first `MAX_ENTRIES` names. If there are
    more, the last note says how many.
    """
    pairs = _pairs(value, what)
    kept = {
        cut(text(key, f"a name in {what}"), MAX_NAME): cut(
            text(item, f"{what}[{shorten_value(key)}]"), most
        )
        for key, item in pairs[:MAX_ENTRIES]
    }
    return kept if len(pairs) <= MAX_ENTRIES else {**kept, "...": f"{len(pairs)} notes"}


def _pairs(value: object, what: str) -> list[tuple[object, object]]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {shorten_value(value)}")
    return list(dict(value).items())


def json_object(value: object, what: str, most: int) -> dict[str, Any]:
    """Return a copy of a dict whose JSON has at most `most` characters."""
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be a dict, got {shorten_value(value)}")
    try:
        written = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON-serializable: {cut(str(error), 200)}") from None
    if len(written) > most:
        raise ValueError(f"{what} must be at most {most} characters of JSON, got {len(written)}")
    copy: dict[str, Any] = json.loads(written)
    return copy
