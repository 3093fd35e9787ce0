"""The two protocols in which a policy calls tools, `native` and `tags`.

- `native`: the model's own format. Its chat template gets the tools as JSON schemas. A turn holds
  any number of `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and a turn without one
  ends the episode. Results are messages of role `tool`. Qwen2.5 is trained on this format.
- `tags`: plain text that can be explained to any model (jaxgrpo/toolkit/tags.py). The tools are in
  the system message, one line each. The policy says explicitly that it has finished or gives up.

Both read JSON strictly and with limits (jaxgrpo/toolkit/calls.py).
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxgrpo import checked
from jaxgrpo.environment import Observation
from jaxgrpo.toolkit import tags
from jaxgrpo.toolkit.calls import MAX_CALLS, Action, read_json, request
from jaxgrpo.toolkit.functions import Schema, signature_of
from jaxgrpo.types import Message, ToolCall

NATIVE_INSTRUCTIONS = (
    "Fulfil the user's request with the tools. "
    "When nothing is left to do, answer without a tool call."
)
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"

Request = tuple[str, Mapping[str, object]]
"""The name of a tool and the arguments, such as `("ls", {"folder": "a"})`."""


class ToolProtocol(Protocol):
    """How an episode is opened, how a policy turn is read, and how it is answered."""

    instructions: str
    """The system message, in front of what an environment adds."""

    def opening(
        self, instructions: str, tools: Sequence[Schema], messages: Sequence[Message]
    ) -> Observation:
        """Return the first observation: instructions, tools (schemas as chat templates take them),
        and the messages, the last of which is the first query."""

    def parse(self, text: str) -> Action:
        """Read a policy turn. No text raises."""

    def said(self, text: str) -> str:
        """Return what a policy turn says to the user, without reasoning and marks."""

    def results(self, calls: Sequence[ToolCall], left: int) -> Observation:
        """Show the results of the calls that were run. `left` later ones were not."""

    def fault(self, text: str) -> Observation:
        """Answer a turn that could not be read."""

    def query(self, text: str) -> Observation:
        """Continue with a message of the user."""

    def write_calls(self, calls: Sequence[Request], reasoning: str = "") -> str:
        """Write a policy turn that makes these calls: the inverse of `parse`."""

    def write_end(self, gave_up: bool = False, reasoning: str = "") -> str:
        """Write a policy turn that ends the episode."""


class Tags:
    """Plain text with tags; see jaxgrpo/toolkit/tags.py."""

    instructions = tags.INSTRUCTIONS

    def opening(
        self, instructions: str, tools: Sequence[Schema], messages: Sequence[Message]
    ) -> Observation:
        described = "\n".join(describe(tool) for tool in tools)
        return self.described_opening(instructions, described, messages)

    def described_opening(
        self, instructions: str, described: str, messages: Sequence[Message]
    ) -> Observation:
        """Return the first observation, for tools that are described as text already."""
        system = Message("system", f"{instructions}\nTools:\n{described}")
        return self._observation(system, *messages)

    def parse(self, text: str) -> Action:
        return tags.parse_action(text)

    def said(self, text: str) -> str:
        outside = tags.without_reasoning(text) or ""
        for mark in (tags.FINISHED, tags.GAVE_UP):
            outside = outside.partition(mark)[0]
        return outside.strip()

    def results(self, calls: Sequence[ToolCall], left: int) -> Observation:
        lines = [tags.outcome(call.name, call.result, call.ok, left) for call in calls]
        return self._observation(tags.result_message(lines))

    def fault(self, text: str) -> Observation:
        return self._observation(tags.result_message([text]))

    def query(self, text: str) -> Observation:
        return self._observation(Message("user", text))

    def write_calls(self, calls: Sequence[Request], reasoning: str = "") -> str:
        return tags.write_calls(calls, reasoning)

    def write_end(self, gave_up: bool = False, reasoning: str = "") -> str:
        return tags.write_end(gave_up, reasoning)

    def _observation(self, *messages: Message) -> Observation:
        return Observation(messages, stop_strings=tags.STOP_STRINGS)


class Native:
    """The chat template's tool calls. A reply without one ends the turn. It cannot give up."""

    instructions = NATIVE_INSTRUCTIONS

    def opening(
        self, instructions: str, tools: Sequence[Schema], messages: Sequence[Message]
    ) -> Observation:
        return Observation((Message("system", instructions), *messages), tools=tuple(tools))

    def parse(self, text: str) -> Action:
        requests, position = [], 0
        while (start := text.find(_OPEN, position)) >= 0:
            start += len(_OPEN)
            end = text.find(_CLOSE, start)
            if end < 0:
                return Action(
                    fault="The tool call was not closed with </tool_call>; nothing was done."
                )
            value, fault = read_json(text[start:end])
            if fault:
                return Action(fault=f"The tool call could not be read: {fault}; nothing was done.")
            requests.append(request(value, "arguments"))
            position = end
            if len(requests) > MAX_CALLS:
                return Action(
                    fault=f"There were more than {MAX_CALLS} tool calls; nothing was done."
                )
        return Action(requests=tuple(requests), finished=not requests)

    def said(self, text: str) -> str:
        return text.partition(_OPEN)[0].strip()

    def results(self, calls: Sequence[ToolCall], left: int) -> Observation:
        skipped = ["not run: an earlier call failed"] * left
        return Observation(
            tuple(Message("tool", text) for text in [*(call.result for call in calls), *skipped])
        )

    def fault(self, text: str) -> Observation:
        return Observation((Message("tool", text),))

    def query(self, text: str) -> Observation:
        return Observation((Message("user", text),))

    def write_calls(self, calls: Sequence[Request], reasoning: str = "") -> str:
        blocks = [
            json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
            for name, arguments in calls
        ]
        return "\n".join(
            [
                *([reasoning] if reasoning else []),
                *(f"{_OPEN}\n{block}\n{_CLOSE}" for block in blocks),
            ]
        )

    def write_end(self, gave_up: bool = False, reasoning: str = "") -> str:
        return reasoning or ("That cannot be done." if gave_up else "Done.")


PROTOCOLS: dict[str, ToolProtocol] = {"native": Native(), "tags": Tags()}
"""The protocols by name."""


def protocol_of(given: Any) -> ToolProtocol:
    """Return a protocol by its name; one that is an object already is returned as it is. Raises
    ValueError for an unknown name."""
    if not isinstance(given, str):
        custom: ToolProtocol = given
        return custom
    if given not in PROTOCOLS:
        close = difflib.get_close_matches(given, PROTOCOLS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        shown = checked.shorten_value(given)
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {shown}{hint}")
    return PROTOCOLS[given]


def describe(tool: Schema) -> str:
    """Describe a tool as text: its signature, its description, and its arguments, one per line."""
    function = tool["function"]
    parameters = function.get("parameters", {})
    head = signature_of(function["name"], parameters)
    described = " ".join(function.get("description", "").split())
    arguments = [
        f"    {name}: {schema['description']}"
        for name, schema in parameters.get("properties", {}).items()
        if schema.get("description")
    ]
    return "\n".join([f"{head}: {described}" if described else head, *arguments])
