"""What an environment is: one class that observes, steps and scores, and a suite that lists tasks and creates one for each episode."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from jaxgrpo import checked
from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall

MAX_TOOL_CHARS = 100_000
"""Of the JSON of one tool's schema."""

MAX_CALLS = 10_000
"""Tool calls of one step."""

_SHAPE = (
    '{"name": ..., "description": ..., "parameters": {...}}, alone or as '
    '{"type": "function", "function": {...}}'
)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy sees now.

    The first observation of an episode holds the whole opening (system prompt, first query) and, when the model's own tool-call form is
    used, the JSON schemas of the tools for the chat template. Every later one holds only the new messages. `stop_strings` end the policy's
    next turn and are kept in its text; the end-of-turn token always ends it.

    Raises TypeError or ValueError for no messages, for schemas without a name or two of one name, for stop strings that are empty, and
    for what is no tuple.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        messages = checked.items(self.messages, "an observation's messages")
        if not messages:
            raise ValueError("an observation needs a message: the policy sees nothing else")
        messages = tuple(checked.record(message, Message, "a message") for message in messages)
        object.__setattr__(self, "messages", messages)
        object.__setattr__(self, "tools", _tools(self.tools))
        object.__setattr__(self, "stop_strings", _stop_strings(self.stop_strings))


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one policy turn led to: exactly one of `observation` (the episode goes on) and `stop_reason` (it is over) is set.

    Raises TypeError or ValueError for what these cannot be, and for calls that are not ToolCalls.
    """

    observation: Observation | None = None
    stop_reason: StopReason | None = None
    calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        if (self.observation is None) == (self.stop_reason is None):
            raise ValueError(
                "a step either observes or stops: set exactly one of observation and stop_reason"
            )
        if self.stop_reason is None:
            observation = checked.record(self.observation, Observation, "a step's observation")
            object.__setattr__(self, "observation", observation)
        elif not isinstance(self.stop_reason, StopReason):
            given = checked.shown(self.stop_reason)
            raise TypeError(f"a step's stop_reason must be of StopReason, got {given}")
        calls = checked.items(self.calls, "a step's calls", MAX_CALLS)
        calls = tuple(checked.record(call, ToolCall, "a step's call") for call in calls)
        object.__setattr__(self, "calls", calls)

    @property
    def done(self) -> bool:
        return self.stop_reason is not None


def _tools(given: object) -> tuple[dict[str, Any], ...]:
    what = "an observation's tools"
    tools = tuple(_tool(tool) for tool in checked.items(given, what, checked.MAX_ENTRIES))
    names = Counter(tool.get("function", tool)["name"] for tool in tools)
    repeated = [name for name, times in names.items() if times > 1]
    if repeated:
        raise ValueError(
            f"{what} have the name {repeated[0]!r} twice: calls could not be told apart"
        )
    return tools


def _tool(given: object) -> dict[str, Any]:
    """A tool's schema, as a copy of its own."""
    schema = checked.json_object(given, "a tool's schema", MAX_TOOL_CHARS)
    function: object = schema
    if "function" in schema:
        function = schema["function"] if schema.get("type") == "function" else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"a tool's schema must be {_SHAPE}, got {checked.shown(schema)}")
    name = checked.name(function["name"], "a tool's name")
    checked.text(function.get("description", ""), f"the description of tool {name!r}")
    if not isinstance(function.get("parameters", {}), dict):
        given = checked.shown(function["parameters"])
        raise TypeError(
            f"the parameters of tool {name!r} must be a JSON schema, a dict, got {given}"
        )
    return schema


def _stop_strings(given: object) -> tuple[str, ...]:
    listed = checked.items(given, "an observation's stop strings", checked.MAX_ENTRIES)
    strings = tuple(checked.text(each, "a stop string") for each in listed)
    for string in strings:
        if not string:
            raise ValueError("a stop string must not be empty: every turn would end at once")
        string.encode()  # half a surrogate pair could not be sent to a server
    return strings


class Environment(Protocol):
    """One episode: observe once, step until done (or until a limit ends it from outside), score once, discard.

    What the policy says badly is an observation. What the environment itself does wrong is an exception: it ends the episode with
    `StopReason.ENVIRONMENT_ERROR`, is counted, and never becomes a reward.
    """

    def observe(self) -> Observation:
        """The opening of the episode. Episodes of one task must observe the same: they share their prompt."""

    def step(self, action: str) -> StepResult:
        """Take the policy's text of one turn, stop string included, end-of-turn token removed."""

    def score(self) -> Score:
        """Judge the episode as it stands; called once, also when a limit ended it."""


class TaskSuite(Protocol):
    """Where tasks come from; what a config's `environment` holds. A frozen dataclass: its options can be set from the command line."""

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of "train" or "test", in a fixed order."""

    def create(self, task: Task) -> Environment:
        """A fresh environment for one episode of the task. Called from worker threads: it must not share mutable state."""
