"""The `tags` protocol: how a policy writes its reasoning, its tool calls and its end in plain text, and how results come back.

One policy turn is optional reasoning and then exactly one of: a list of calls, the end, giving up.

    <reasoning>I need the file's name first.</reasoning>
    <tool>[{"name": "ls", "args": {}}]</tool>

Results come back as a message of role `system`: `<tool_result>["ls succeeded: ..."]</tool_result>`. Whatever the policy writes badly is
answered with a message that says what was wrong. Nothing here raises on any text.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

from jaxgrpo.types import Message

FINISHED = "<TASK_FINISHED>"
GAVE_UP = "<TASK_ERROR>"
STOP_STRINGS = ("</tool>", FINISHED, GAVE_UP)

INSTRUCTIONS = (
    "Fulfil the user's request with the tools below. Think inside <reasoning></reasoning>, then call tools with a JSON list:\n"
    '<tool>[{"name": "tool_name", "args": {"argument": "value"}}]</tool>\n'
    "You will see a <tool_result> and can go on. "
    "When the request is fulfilled, write <TASK_FINISHED>. If it cannot be, write <TASK_ERROR>."
)

MAX_JSON_CHARS = 100_000
MAX_JSON_DEPTH = 24
MAX_CALLS = 200  # in one list
_OPEN, _CLOSE = "<reasoning>", "</reasoning>"


@dataclasses.dataclass(frozen=True)
class ToolRequest:
    """One call that the policy asks for: `ToolRequest("ls", {})`; with `fault` set, it is malformed and cannot run."""

    name: str
    arguments: Mapping[str, object]
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Action:
    """What a policy turn asks for: calls, or the end (`finished` or `gave_up`), or, with `fault` set, nothing that can be understood."""

    requests: tuple[ToolRequest, ...] = ()
    finished: bool = False
    gave_up: bool = False
    fault: str = ""


def parse_action(text: str) -> Action:
    """Read one policy turn. The first closing mark outside the reasoning decides, as it would have stopped the sampler.

    >>> parse_action("<reasoning>Not <TASK_FINISHED> yet.</reasoning><TASK_ERROR>").gave_up
    True
    """
    outside = without_reasoning(text)
    if outside is None:
        return Action(
            fault="The reasoning was not closed with </reasoning> before the turn ended; nothing was done."
        )
    marks = [(outside.find(mark), mark) for mark in STOP_STRINGS if mark in outside]
    if not marks:
        return Action(
            fault="There was no <tool>...</tool> and no <TASK_FINISHED> or <TASK_ERROR>; nothing was done."
        )
    position, mark = min(marks)
    start = outside.find("<tool>", 0, position)
    if mark != "</tool>":
        if start >= 0:
            return Action(fault="The tool call was not closed with </tool>; nothing was done.")
        return Action(finished=mark == FINISHED, gave_up=mark == GAVE_UP)
    if start < 0:
        return Action(fault="There was a </tool> without a <tool>; nothing was done.")
    return _parse_list(outside[start + len("<tool>") : position])


def without_reasoning(text: str) -> str | None:
    """The text outside its reasoning blocks, or None where a block is not closed."""
    kept, position = [], 0
    while (start := text.find(_OPEN, position)) >= 0:
        end = text.find(_CLOSE, start)
        if end < 0:
            return None
        kept.append(text[position:start])
        position = end + len(_CLOSE)
    return "".join(kept) + text[position:]


def _parse_list(text: str) -> Action:
    value, fault = read_json(text)
    if not fault:
        fault = _fault_of_list(value)
    if fault or not isinstance(value, list):
        return Action(fault=f"The tool call could not be read: {fault}; nothing was done.")
    return Action(requests=tuple(request(item, "args") for item in value))


def _fault_of_list(value: object) -> str:
    if not isinstance(value, list):
        return 'expected a list: [{"name": ..., "args": {...}}]'
    if not value:
        return "the list is empty"
    return f"the list has more than {MAX_CALLS} calls" if len(value) > MAX_CALLS else ""


def request(item: object, key: str) -> ToolRequest:
    """One call object, e.g. `{"name": "ls", "args": {}}` with `key="args"`."""
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
    """Strict JSON of bounded size and depth: the value and "", or None and what is wrong with the text."""
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
    """Whether the value's texts can be written as UTF-8; half a surrogate pair would break every log and tokenizer behind us."""
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


def write_calls(calls: Sequence[tuple[str, Mapping[str, object]]], reasoning: str = "") -> str:
    """The text of a policy turn that makes these calls: the inverse of `parse_action`."""
    listed = json.dumps(
        [{"name": name, "args": dict(arguments)} for name, arguments in calls], ensure_ascii=False
    )
    return f"{write_reasoning(reasoning)}<tool>{listed}</tool>"


def write_end(gave_up: bool = False, reasoning: str = "") -> str:
    """The text of a policy turn that ends the task."""
    return f"{write_reasoning(reasoning)}{GAVE_UP if gave_up else FINISHED}"


def write_reasoning(reasoning: str) -> str:
    return f"{_OPEN}{reasoning}{_CLOSE}\n" if reasoning else ""


def result_message(lines: Sequence[str]) -> Message:
    """The results of one policy turn, a text for each call that was tried."""
    return Message(
        "system", f"<tool_result>{json.dumps(list(lines), ensure_ascii=False)}</tool_result>"
    )


def outcome(name: str, text: str, ok: bool, left: int = 0) -> str:
    """How one call went, as the policy reads it; `left` calls of its list were not tried because it failed."""
    if ok:
        return f"{name} succeeded: {text}"
    rest = f" ({left} later call{'s were' if left > 1 else ' was'} not run)" if left else ""
    return f"{name or 'call'} failed: {text}{rest}"
