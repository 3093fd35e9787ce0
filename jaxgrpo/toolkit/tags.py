"""Read and write the `tags` protocol: reasoning, tool calls and results as plain text.

A policy turn is optional reasoning, followed by a list of calls, `<TASK_FINISHED>` or
`<TASK_ERROR>`.

    <reasoning>I need the file's name first.</reasoning>
    <tool>[{"name": "ls", "args": {}}]</tool>

Results come back in a message of role `system`: `<tool_result>["ls succeeded: ..."]</tool_result>`.
Malformed turns are answered with a message that names the fault. No text raises an exception.
"""

import json
from collections.abc import Mapping, Sequence

from jaxgrpo.toolkit.calls import MAX_CALLS, Action, read_json, request
from jaxgrpo.types import Message

FINISHED = "<TASK_FINISHED>"
GAVE_UP = "<TASK_ERROR>"
STOP_STRINGS = ("</tool>", FINISHED, GAVE_UP)

INSTRUCTIONS = (
    "Fulfil the user's request with the tools below. "
    "Think inside <reasoning></reasoning>, then call tools with a JSON list:\n"
    '<tool>[{"name": "tool_name", "args": {"argument": "value"}}]</tool>\n'
    "You will see a <tool_result> and can go on. "
    "When the request is fulfilled, write <TASK_FINISHED>. If it cannot be, write <TASK_ERROR>."
)

_OPEN, _CLOSE = "<reasoning>", "</reasoning>"


def parse_action(text: str) -> Action:
    """Read one policy turn up to the first stop string outside the reasoning.

    >>> parse_action("<reasoning>Not <TASK_FINISHED> yet.</reasoning><TASK_ERROR>").gave_up
    True
    """
    outside = without_reasoning(text)
    if outside is None:
        return Action(
            fault="The reasoning was not closed with </reasoning> before the turn ended; "
            "nothing was done."
        )
    marks = [(outside.find(mark), mark) for mark in STOP_STRINGS if mark in outside]
    if not marks:
        return Action(
            fault="There was no <tool>...</tool> and no <TASK_FINISHED> or <TASK_ERROR>; "
            "nothing was done."
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
    """Return the text outside its reasoning blocks, or None if a block is not closed."""
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


def write_calls(calls: Sequence[tuple[str, Mapping[str, object]]], reasoning: str = "") -> str:
    """Write a policy turn that makes these calls: the inverse of `parse_action`."""
    listed = json.dumps(
        [{"name": name, "args": dict(arguments)} for name, arguments in calls], ensure_ascii=False
    )
    return f"{write_reasoning(reasoning)}<tool>{listed}</tool>"


def write_end(gave_up: bool = False, reasoning: str = "") -> str:
    """Write a policy turn that ends the task."""
    return f"{write_reasoning(reasoning)}{GAVE_UP if gave_up else FINISHED}"


def write_reasoning(reasoning: str) -> str:
    return f"{_OPEN}{reasoning}{_CLOSE}\n" if reasoning else ""


def result_message(lines: Sequence[str]) -> Message:
    """Return the message with the results of one policy turn: one text per call that was tried."""
    return Message(
        "system", f"<tool_result>{json.dumps(list(lines), ensure_ascii=False)}</tool_result>"
    )


def outcome(name: str, text: str, ok: bool, left: int = 0) -> str:
    """Word the result of one call. After a failure, `left` later calls were not tried."""
    if ok:
        return f"{name} succeeded: {text}"
    rest = f" ({left} later call{'s were' if left > 1 else ' was'} not run)" if left else ""
    return f"{name or 'call'} failed: {text}{rest}"
