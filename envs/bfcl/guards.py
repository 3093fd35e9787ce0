"""Calls that would hang or exhaust the process, refused before they run.

The simulators compute whatever they are asked: `power(9, 10**9)`, a logarithm to a billion digits, a directory copied into itself until
its tree is larger than memory. A refusal is an error result that the policy sees, like any other. No ground-truth call comes near a bound.
"""

from collections.abc import Mapping

MAX_DIGITS = 1_000  # of precision and of rounding; the data asks for at most 10
MAX_POWER_BITS = 1 << 16  # Python itself prints at most 4,300 digits, about 14,300 bits
MAX_TREE = 5_000  # files and directories of one file system
MAX_NUMBER_TEXT = 40  # characters of a number given as text


def refusal(name: str, arguments: Mapping[str, object], instance: object) -> str | None:
    """Why this call must not run, or None."""
    check = _CHECKS.get(name)
    return check(arguments, instance) if check else None


def _power(arguments: Mapping[str, object], instance: object) -> str | None:
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if not isinstance(base, int) or not isinstance(exponent, int) or abs(base) <= 1 or exponent <= 0:
        return None  # floats overflow at once
    return "the result is too large" if base.bit_length() * exponent > MAX_POWER_BITS else None


def _precision(arguments: Mapping[str, object], instance: object) -> str | None:
    for key in ("precision", "decimal_places"):
        value = arguments.get(key, 0)
        if not isinstance(value, int | float) or abs(value) > MAX_DIGITS:
            return f"{key} must be a number of at most {MAX_DIGITS}"
    for key in ("value", "base", "number"):
        value = arguments.get(key)
        if isinstance(value, str) and not _short_number(value):
            return f"{key} must be a number"
    return None


def _short_number(text: str) -> bool:
    """Whether the text is short and within a float's range: mpmath would otherwise expand `1e1000000000` digit by digit."""
    try:
        return len(text) <= MAX_NUMBER_TEXT and abs(float(text)) < 1e300
    except ValueError:
        return False


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
    "logarithm": _precision,
    "square_root": _precision,
    "round_number": _precision,
    "cp": _copy,
}
