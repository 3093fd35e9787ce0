"""The two protocols between a policy and BFCL's environment.

They are those of jaxgrpo/toolkit/protocols.py. BFCL adds its tools' documents and worked examples.
"""

import json
from collections.abc import Sequence
from typing import Protocol as TypingProtocol

from jaxgrpo.environment import Observation
from jaxgrpo.envs.bfcl import docs
from jaxgrpo.toolkit import protocols
from jaxgrpo.toolkit.protocols import ToolProtocol
from jaxgrpo.types import Message, ToolCall

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


class Protocol(ToolProtocol, TypingProtocol):
    """A protocol that also opens an episode with BFCL's documents and examples."""

    def open(
        self, documents: Sequence[docs.Document], detail: str, examples: int, query: str
    ) -> Observation: ...


class Tags(protocols.Tags):
    """Plain text with tags. The documents are as detailed as the setting `docs` says."""

    def open(
        self, documents: Sequence[docs.Document], detail: str, examples: int, query: str
    ) -> Observation:
        messages = [*_example_messages(self, examples), Message("user", query)]
        return self.described_opening(self.instructions, docs.describe(documents, detail), messages)


class Native(protocols.Native):
    """The chat template's tool calls, with schemas that may hold a `response`."""

    def open(
        self, documents: Sequence[docs.Document], detail: str, examples: int, query: str
    ) -> Observation:
        messages = [*_example_messages(self, examples), Message("user", query)]
        schemas = [docs.schema(document, detail) for document in documents]
        return self.opening(self.instructions, schemas, messages)


PROTOCOLS: dict[str, Protocol] = {"tags": Tags(), "native": Native()}


def _example_messages(protocol: Protocol, count: int) -> list[Message]:
    """Return worked examples as conversations that precede the task's own."""
    messages = []
    for tool, request, reasoning, arguments, result in EXAMPLES[:count]:
        name = tool.split("(")[0]
        messages.append(Message("user", f"(Example, with one more tool: {tool})\n{request}"))
        messages.append(Message("assistant", protocol.write_calls([(name, arguments)], reasoning)))
        messages.extend(
            protocol.results([ToolCall(name, json.dumps(arguments), result, ok=True)], 0).messages
        )
        messages.append(Message("assistant", protocol.write_end()))
    return messages
