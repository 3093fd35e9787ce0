"""Calls that would hang or exhaust the process, refused before they run.

The simulators compute whatever they are asked: `power(9, 10**9)`, a logarithm to a billion digits, a directory copied into itself until
its tree is larger than memory. A refusal is an error result that the policy sees, like any other. No ground-truth call comes near a bound.
What is merely wrong (a text for a number, say) is left to the simulator: it may take it, and otherwise has its own words for it.
"""

import re
from collections.abc import Mapping

MAX_DIGITS = 1_000  # of precision and of rounding; the data asks for at most 10
MAX_POWER_BITS = 1 << 16  # Python itself prints at most 4,300 digits, about 14,300 bits
MAX_TREE = 5_000  # files and directories of one file system
MAX_EXPONENT = 400  # of a number given as text: a float goes up to 308
MAX_NUMBER_TEXT = 4_300  # characters of such a text; Python itself reads no more digits


def refusal(name: str, arguments: Mapping[str, object], instance: object) -> str | None:
    """Why this call must not run, or None."""
    check = _CHECKS.get(name)
    return check(arguments, instance) if check else None


def _power(arguments: Mapping[str, object], instance: object) -> str | None:
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if (
        not isinstance(base, int)
        or not isinstance(exponent, int)
        or abs(base) <= 1
        or exponent <= 0
    ):
        return None  # floats overflow at once
    return "the result is too large" if base.bit_length() * exponent > MAX_POWER_BITS else None


def _logarithm(arguments: Mapping[str, object], instance: object) -> str | None:
    """mpmath takes texts for numbers, expands `1e1000000000` digit by digit, and computes as many digits as it is asked for."""
    precision = arguments.get("precision")
    if isinstance(precision, str | float | int) and _whole(precision) > MAX_DIGITS:
        return f"precision must be at most {MAX_DIGITS}"
    for key in ("value", "base"):
        text = arguments.get(key)
        if isinstance(text, str) and (len(text) > MAX_NUMBER_TEXT or _has_large_exponent(text)):
            return f"{key} is too large"
    return None


def _has_large_exponent(text: str) -> bool:
    return any(
        abs(int(exponent)) > MAX_EXPONENT for exponent in re.findall(r"[eEpP]([+-]?\d{1,20})", text)
    )


def _whole(number: str | float) -> int:
    """The whole number that Python's `int` reads, or 0 where it refuses."""
    try:
        return int(number)
    except (ValueError, OverflowError):
        return 0


def _square_root(arguments: Mapping[str, object], instance: object) -> str | None:
    precision = arguments.get("precision")
    return (
        f"precision must be at most {MAX_DIGITS}"
        if isinstance(precision, int) and precision > MAX_DIGITS
        else None
    )


def _round_number(arguments: Mapping[str, object], instance: object) -> str | None:
    places = arguments.get("decimal_places")
    return (
        f"decimal_places must be at least -{MAX_DIGITS}"
        if isinstance(places, int) and places < -MAX_DIGITS
        else None
    )


def _copy(arguments: Mapping[str, object], instance: object) -> str | None:
    """Copies share their files with the original, so that n copies can build a tree of 2**n entries, or one without an end."""
    current = getattr(instance, "_current_dir", None)
    source = arguments.get("source")
    if current is None or not isinstance(source, str):
        return None
    if source == arguments.get("destination") and hasattr(current.contents.get(source), "contents"):
        return f"cannot copy '{source}' into itself"
    if tree_size(current.contents.get(source)) + tree_size(instance.root) > MAX_TREE:  # type: ignore[attr-defined]
        return "no space left"
    return None


def tree_size(item: object, limit: int = MAX_TREE) -> int:
    """How many files and directories a tree shows, counted until just above the limit."""
    stack, count = [item], 0
    while stack and count <= limit:
        count += 1
        stack.extend(getattr(stack.pop(), "contents", {}).values())
    return count


_CHECKS = {
    "power": _power,
    "logarithm": _logarithm,
    "square_root": _square_root,
    "round_number": _round_number,
    "cp": _copy,
}
