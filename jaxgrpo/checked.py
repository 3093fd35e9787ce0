"""Checks of what users' code gives, made where it enters: in the records of `types.py` and `jaxgrpo/environment.py`.

Each function returns the value, of exactly the built-in type that it names, or raises TypeError or
ValueError with one line. What is sound is made plain: a NumPy number, a list, a text of a class of
its own. What comes out can be compared, recorded and averaged without running the users' code.
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
"""Of a reward and its parts. Twice as large a number has lost its fourth decimal in float64, and
gradients that it multiplies come within reach of float32's end, once they are squared."""

MAX_NAME = 500
"""Characters of a name."""

MAX_ENTRIES = 1_000
"""Of one mapping, and stop strings of one observation."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: object) -> str:
    """A short `repr`, for error lines, of anything: of what is huge, and of what cannot be printed."""
    try:
        return _SHORT.repr(value)
    except Exception:  # the edge to a user's __repr__, and Python's limit on digits
        return f"<{type(value).__name__} that cannot be printed>"


def cut(text: str, most: int) -> str:
    """At most so many characters of a text, with a mark where some are left out."""
    if len(text) <= most:
        return text
    mark = f"... ({len(text)} characters)"
    return text[: max(0, most - len(mark))] + mark


def text(value: object, what: str) -> str:
    """A text, as a plain one."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a text, got {shown(value)}")
    return str.__str__(value)


def name(value: object, what: str) -> str:
    """What something is called: a text that can be printed on a line, and is not empty."""
    plain = text(value, what)
    if not plain or len(plain) > MAX_NAME or not plain.isprintable():
        raise ValueError(
            f"{what} must be 1 to {MAX_NAME} characters that can be printed, got {shown(plain)}"
        )
    return plain


def number(value: object, what: str) -> float:
    """A number, NumPy's included; its size is bounded by `MAX_MAGNITUDE`."""
    if not isinstance(value, Real | np.bool_):
        raise TypeError(f"{what} must be a finite number, got {shown(value)}")
    try:
        plain = float(value)
    except OverflowError:
        plain = math.inf
    if not abs(plain) <= MAX_MAGNITUDE:
        raise ValueError(
            f"{what} must be a finite number from -{MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}, "
            f"got {shown(value)}"
        )
    return plain


def flag(value: object, what: str) -> bool:
    """True or False, NumPy's included."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{what} must be True or False, got {shown(value)}")
    return bool(value)


def items(value: object, what: str, most: int | None = None) -> tuple[Any, ...]:
    """A tuple, or a list, as a tuple. A text would be taken for its letters; a set has no order."""
    if not isinstance(value, tuple | list):
        such = f" such as ({shown(value)},)" if isinstance(value, str) else ""
        raise TypeError(f"{what} must be a tuple{such}, got {shown(value)}")
    if most is not None and len(value) > most:
        raise ValueError(f"{what} must be at most {most}, got {len(value)}")
    return tuple(value)


def record(value: object, kind: type[T], what: str) -> T:
    """A record of a dataclass. One of a derived class, which may leave out the checks, is made anew."""
    if type(value) is kind:
        return value
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be of {kind.__name__}, got {shown(value)}")
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: getattr(value, field.name) for field in fields})


def numbers(value: object, what: str) -> dict[str, float]:
    """Numbers by name, as a plain dict."""
    pairs = items(_pairs(value, what), what, MAX_ENTRIES)
    return {
        name(key, f"a name in {what}"): number(item, f"{what}[{shown(key)}]") for key, item in pairs
    }


def notes(value: object, what: str, most: int) -> dict[str, str]:
    """Texts by name, as a plain dict. Of each, at most `most` characters are kept; of the names, the
    first `MAX_ENTRIES`, and a note that says how many there were."""
    pairs = _pairs(value, what)
    kept = {
        cut(text(key, f"a name in {what}"), MAX_NAME): cut(
            text(item, f"{what}[{shown(key)}]"), most
        )
        for key, item in pairs[:MAX_ENTRIES]
    }
    return kept if len(pairs) <= MAX_ENTRIES else {**kept, "...": f"{len(pairs)} notes"}


def _pairs(value: object, what: str) -> list[tuple[object, object]]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {shown(value)}")
    return list(dict(value).items())


def json_object(value: object, what: str, most: int) -> dict[str, Any]:
    """A dict that JSON can say, in at most `most` characters, as a copy of its own."""
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be a dict, got {shown(value)}")
    try:
        written = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be what JSON can say: {cut(str(error), 200)}") from None
    if len(written) > most:
        raise ValueError(f"{what} must be at most {most} characters of JSON, got {len(written)}")
    return json.loads(written)
