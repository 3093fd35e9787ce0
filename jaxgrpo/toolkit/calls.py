"""Read the tool calls of a policy turn, for both protocols.

No text of the policy raises an exception. A text that cannot be read becomes a fault, which says
why.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence

from jaxgrpo.types import ToolCall

MAX_JSON_CHARS = 100_000
"""Most characters of one JSON text of the policy."""

MAX_JSON_DEPTH = 24
"""Most levels of nesting in it."""

MAX_CALLS = 200
"""Most calls of one policy turn that are read."""


@dataclasses.dataclass(frozen=True)
class ToolRequest:
    """One requested call, such as `ToolRequest("ls", {})`. If `fault` is set, it cannot run."""

    name: str
    arguments: Mapping[str, object]
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Action:
    """A parsed policy turn: calls, or the end (`finished` or `gave_up`), or a `fault`."""

    requests: tuple[ToolRequest, ...] = ()
    finished: bool = False
    gave_up: bool = False
    fault: str = ""


def run_in_order(
    requests: Sequence[ToolRequest], run: Callable[[ToolRequest], ToolCall]
) -> tuple[ToolCall, ...]:
    """Run the calls up to the first that fails. Calls before it keep their effect."""
    made: list[ToolCall] = []
    for request in requests:
        made.append(run(request))
        if not made[-1].ok:
            break
    return tuple(made)


def request(item: object, key: str) -> ToolRequest:
    """Check one call object, such as `{"name": "ls", "args": {}}` with `key="args"`."""
    if not isinstance(item, dict):
        return ToolRequest("", {}, f'a call must be an object with "name" and "{key}"')
    name, arguments = item.get("name"), item.get(key)
    if not isinstance(name, str) or not name:
        return ToolRequest("", {}, 'the call\'s "name" must be a text')
    if not isinstance(arguments, dict):
        return ToolRequest(name, {}, f'the call\'s "{key}" must be an object')
    if len(item) > 2:
        return ToolRequest(name, {}, f'a call has only "name" and "{key}"')
    return ToolRequest(name, arguments)


def read_json(text: str) -> tuple[object, str]:
    """Read strict JSON of bounded size and depth. Return (value, ""), or (None, fault)."""
    if len(text) > MAX_JSON_CHARS:
        return None, f"it is longer than {MAX_JSON_CHARS} characters"
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except RecursionError:
        return None, "it is nested too deeply"
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python reads
        return None, f"not valid JSON ({str(error)[:200]})"
    if _deeper_than(value, MAX_JSON_DEPTH):
        return None, "it is nested too deeply"
    if "\\u" in text and not _encodable(value):
        return None, "it holds half of a surrogate pair"
    return value, ""


def _encodable(value: object) -> bool:
    """Whether UTF-8 can encode the value. Half a surrogate pair would break logs and tokenizers."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a key twice")
    return value


def _deeper_than(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)
