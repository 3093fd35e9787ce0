"""Script the turns of a policy in advance. The real rollout plays them.

They show how an environment answers a solution, mistakes and an early end, before any model is
loaded.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrpo.environment import Observation
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.tool_schemas import example, schema_problems
from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest

DEMONSTRATION = "demonstration"
NO_TOOL = "no_such_tool"
_FEW = 8
_ODD = "\x00 \u200f{}[] %s \\ é 你好 \U0001f642 null -1e999"


@dataclasses.dataclass(frozen=True)
class Script:
    """The turns of an episode, in order. If the environment still waits after the last one, they
    begin again, or with `once` every further turn is empty."""

    name: str
    turns: tuple[str, ...]
    once: bool = False


def demonstration_script(turns: Sequence[str]) -> Script:
    """Return the script that solves a task."""
    return Script(DEMONSTRATION, tuple(turns), once=True)


def mistakes(opening: Observation) -> tuple[Script, ...]:
    """Return scripts that solve nothing, in the form of the opening: tool calls of the chat
    template if it declares tools, otherwise text inside the tag that its stop strings close."""
    scripts = [
        Script("immediate end", ("", *opening.stop_strings[:_FEW])),
        Script("malformed turn", _malformed(opening)),
        Script("unknown tool", _calls_of(NO_TOOL, opening)),
    ]
    tools = [tool.get("function", tool) for tool in opening.tools[:_FEW]]
    if tools:
        wrong = [turn for tool in tools for turn in _wrong_arguments(tool["name"], opening)]
        scripts.append(Script("wrong arguments", tuple(wrong)))
    sound = [tool for tool in tools if not schema_problems(tool)]
    if sound:
        arguments = [example(tool.get("parameters", {"type": "object"})) for tool in sound]
        made_up = [_native(tool["name"], given) for tool, given in zip(sound, arguments)]
        scripts.append(Script("made-up call", tuple(made_up)))
    return tuple(scripts)


def _malformed(opening: Observation) -> tuple[str, ...]:
    whole = _wrapped("", opening)
    return (
        _wrapped('{"name": "', opening),
        _wrapped("[[[", opening),
        whole[: len(whole) // 2],
        "I would rather talk.",
        _ODD,
        _wrapped(_ODD, opening),
    )


def _calls_of(name: str, opening: Observation) -> tuple[str, ...]:
    if opening.tools:
        return (_native(name, {}),)
    listed = json.dumps([{"name": name, "args": {}}])
    return (_wrapped(listed, opening), _native(name, {}), _wrapped(name, opening))


def _wrong_arguments(name: str, opening: Observation) -> tuple[str, ...]:
    return (
        _native(name, {}),
        _native(name, {"no_such_argument": 1}),
        _wrapped(json.dumps({"name": name, "arguments": "no object"}), opening),
    )


def _native(name: str, arguments: object) -> str:
    called = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{called}\n</tool_call>"


def _wrapped(text: str, opening: Observation) -> str:
    """Return the text in the form of a call."""
    if opening.tools:
        return f"<tool_call>\n{text}\n</tool_call>"
    for stop in opening.stop_strings:
        if found := re.fullmatch(r"</(\w+)>", stop):
            return f"<{found[1]}>{text}{stop}"
    return text + next(iter(opening.stop_strings), "")


def spoken(chat: Chat, tokenizer: Any, text: str, request: SamplingRequest) -> Generation:
    """Return what a sampler would give if the policy said the text: the tokens up to its first stop
    string or end token, otherwise with the end-of-turn token, and at most `request.max_tokens`."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ends = [text.find(stop) + len(stop) for stop in request.stop_strings if stop in text]
    ids = tokenizer.encode(text[: min(ends)] if ends else text, add_special_tokens=False)
    finish = FinishReason.STOP if ends else FinishReason.EOS
    end = next((i for i, token in enumerate(ids) if token in chat.eos_ids), None)
    if end is not None:
        ids, finish = ids[: end + 1], FinishReason.EOS
    elif not ends:
        ids = [*ids, chat.end_of_turn_id]
    if len(ids) > request.max_tokens:
        ids, finish = ids[: request.max_tokens], FinishReason.LENGTH
    count = len(ids)
    zeros = np.zeros(count, np.float32)
    return Generation(np.asarray(ids, np.int32), zeros, np.zeros(count, np.int32), finish)


class ScriptedSampler:
    """A sampler that says the turns of a script, in one episode."""

    weights_folder = None

    def __init__(self, script: Script, chat: Chat, tokenizer: Any):
        self._script, self._chat, self._tokenizer = script, chat, tokenizer
        self.said = 0
        self.cut: tuple[str, str] | None = None
        """The first turn that a stop string cut short, and what was lost of it."""

    @property
    def ran_out(self) -> bool:
        """Whether the environment waited for more turns than the script has."""
        return self.said > len(self._script.turns)

    async def generate(self, request: SamplingRequest) -> Generation:
        turns, once = self._script.turns, self._script.once
        text = "" if once and self.said >= len(turns) else turns[self.said % len(turns)]
        self.said += 1
        generation = spoken(self._chat, self._tokenizer, text, request)
        if generation.finish_reason is FinishReason.STOP and self.cut is None:
            end = min(text.find(s) + len(s) for s in request.stop_strings if s in text)
            self.cut = (text, text[end:]) if text[end:].strip() else None
        return generation

    async def release(self, episode_id: str) -> None:
        """Do nothing: there is no cache."""

    async def publish(self, version: int, weights: Any) -> dict[str, float]:
        """Do nothing: there are no weights."""
        return {}

    async def close(self) -> None:
        """Do nothing."""
