"""The two protocols between a policy and BFCL's environment.

- `tags`: plain text (envs/tool_tags.py).
- `native`: the tool calls of Qwen2.5's chat template, `<tool_call>{"name": ..., "arguments":
  {...}}</tool_call>`. Results are `tool` messages.
"""

import json
from collections.abc import Sequence
from typing import Protocol as TypingProtocol

from jaxgrpo.environment import Observation
from jaxgrpo.envs import tool_tags
from jaxgrpo.envs.bfcl import docs
from jaxgrpo.envs.bfcl.execution import Call
from jaxgrpo.envs.tool_tags import Action
from jaxgrpo.types import Message, ToolCall

NATIVE_INSTRUCTIONS = (
    "Fulfil the user's request with the tools. "
    "When nothing is left to do, answer without a tool call."
)
NEW_TOOLS = (
    "These tools are available from now on:\n{documents}\n"
    "Please go on with what could not be done before."
)
CONTINUE = "Please go on."

EXAMPLES = (
    (
        "set_lamp(room: str, on: bool)",
        "Switch on the lamp in the kitchen.",
        "The kitchen lamp must be on.",
        {"room": "kitchen", "on": True},
        '{"lamp": "on"}',
    ),
    (
        "count_books(shelf: int)",
        "How many books are on shelf 3?",
        "I count the books on shelf 3.",
        {"shelf": 3},
        '{"books": 17}',
    ),
    (
        "water_plants(names: list[str])",
        "Water the fern and the cactus.",
        "Both plants go into one call.",
        {"names": ["fern", "cactus"]},
        '{"watered": 2}',
    ),
)
"""Worked examples as (tool, request, reasoning, arguments, result). No task has these tools."""


class Protocol(TypingProtocol):
    """How to open an episode, read a policy turn, and answer it."""

    def opening(
        self, documents: Sequence[docs.Document], detail: str, examples: int, query: str
    ) -> Observation: ...
    def parse(self, text: str) -> Action: ...
    def results(self, calls: Sequence[ToolCall], left: int) -> Observation: ...
    def fault(self, text: str) -> Observation: ...
    def query(self, text: str) -> Observation: ...
    def write_calls(self, calls: Sequence[Call], reasoning: str) -> str: ...
    def write_end(self, gave_up: bool, reasoning: str) -> str: ...


class Tags:
    """Plain text with tags; see envs/tool_tags.py."""

    def opening(
        self, documents: Sequence[docs.Document], detail: str, examples: int, query: str
    ) -> Observation:
        system = f"{tool_tags.INSTRUCTIONS}\nTools:\n{docs.describe(documents, detail)}"
        messages = [
            Message("system", system),
            *_example_messages(self, examples),
            Message("user", query),
        ]
        return self._observation(*messages)

    def parse(self, text: str) -> Action:
        return tool_tags.parse_action(text)

    def results(self, calls: Sequence[ToolCall], left: int) -> Observation:
        lines = [tool_tags.outcome(call.name, call.result, call.ok, left) for call in calls]
        return self._observation(tool_tags.result_message(lines))

    def fault(self, text: str) -> Observation:
        return self._observation(tool_tags.result_message([text]))

    def query(self, text: str) -> Observation:
        return self._observation(Message("user", text))

    def write_calls(self, calls: Sequence[Call], reasoning: str) -> str:
        return tool_tags.write_calls([(call.name, call.arguments) for call in calls], reasoning)

    def write_end(self, gave_up: bool, reasoning: str) -> str:
        return tool_tags.write_end(gave_up, reasoning)

    def _observation(self, *messages: Message) -> Observation:
        return Observation(messages, stop_strings=tool_tags.STOP_STRINGS)


class Native:
    """The chat template's tool calls. A reply without one ends the turn. It cannot give up."""

    def opening(
        self, documents: Sequence[docs.Document], detail: str, examples: int, query: str
    ) -> Observation:
        messages = [
            Message("system", NATIVE_INSTRUCTIONS),
            *_example_messages(self, examples),
            Message("user", query),
        ]
        return Observation(
            tuple(messages), tools=tuple(docs.schema(document, detail) for document in documents)
        )

    def parse(self, text: str) -> Action:
        requests, position = [], 0
        while (start := text.find("<tool_call>", position)) >= 0:
            start += len("<tool_call>")
            end = text.find("</tool_call>", start)
            if end < 0:
                return Action(
                    fault="The tool call was not closed with </tool_call>; nothing was done."
                )
            value, fault = tool_tags.read_json(text[start:end])
            if fault:
                return Action(fault=f"The tool call could not be read: {fault}; nothing was done.")
            requests.append(tool_tags.request(value, "arguments"))
            position = end
            if len(requests) > tool_tags.MAX_CALLS:
                limit = tool_tags.MAX_CALLS
                return Action(fault=f"There were more than {limit} tool calls; nothing was done.")
        return Action(requests=tuple(requests), finished=not requests)

    def results(self, calls: Sequence[ToolCall], left: int) -> Observation:
        skipped = ["not run: an earlier call failed"] * left
        return Observation(
            tuple(Message("tool", text) for text in [*(call.result for call in calls), *skipped])
        )

    def fault(self, text: str) -> Observation:
        return Observation((Message("tool", text),))

    def query(self, text: str) -> Observation:
        return Observation((Message("user", text),))

    def write_calls(self, calls: Sequence[Call], reasoning: str) -> str:
        blocks = [
            json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
            for call in calls
        ]
        return "\n".join(
            [
                *([reasoning] if reasoning else []),
                *(f"<tool_call>\n{block}\n</tool_call>" for block in blocks),
            ]
        )

    def write_end(self, gave_up: bool, reasoning: str) -> str:
        return reasoning or ("That cannot be done." if gave_up else "Done.")


PROTOCOLS: dict[str, Protocol] = {"tags": Tags(), "native": Native()}


def _example_messages(protocol: Protocol, count: int) -> list[Message]:
    """Return worked examples as conversations that precede the task's own."""
    messages = []
    for tool, request, reasoning, arguments, result in EXAMPLES[:count]:
        call = Call(tool.split("(")[0], arguments)
        messages.append(Message("user", f"(Example, with one more tool: {tool})\n{request}"))
        messages.append(Message("assistant", protocol.write_calls([call], reasoning)))
        messages.extend(
            protocol.results(
                [ToolCall(call.name, json.dumps(arguments), result, ok=True)], 0
            ).messages
        )
        messages.append(Message("assistant", protocol.write_end(False, "")))
    return messages
