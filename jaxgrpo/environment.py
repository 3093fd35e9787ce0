"""Define what an environment is.

An environment is a class that observes, steps and scores. A suite lists tasks, and creates an
environment for each episode.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxgrpo import checked
from jaxgrpo.types import (
    MAX_CALL_CHARS,
    ExpectedCall,
    GroundTruth,
    Message,
    Score,
    StopReason,
    Task,
    ToolCall,
)

MAX_TOOL_CHARS = 100_000
"""Most characters of one tool's schema as JSON."""

MAX_CALLS = 10_000
"""Most tool calls of one step."""

_SHAPE = (
    '{"name": ..., "description": ..., "parameters": {...}}, alone or as '
    '{"type": "function", "function": {...}}'
)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy sees now.

    The first observation of an episode holds the whole opening: system prompt and first query. If
    the environment uses the model's own tool-call format, `tools` holds the JSON schemas of the
    tools for the chat template. Every later observation holds only new messages. `stop_strings` end
    the policy's next turn, and stay in its text. The end-of-turn token always ends it.

    Raises TypeError or ValueError if there are no messages, if a schema has no name or two have the
    same, if a stop string is empty, or if a field is not a tuple.
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
    """The result of one turn of the policy.

    Set exactly one of `observation` (the episode continues) and `stop_reason` (it is over). Raises
    TypeError or ValueError otherwise, and for fields of the wrong type.
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
            given = checked.shorten_value(self.stop_reason)
            raise TypeError(f"a step's stop_reason must be of type StopReason, got {given}")
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
    """Return a copy of a tool's schema."""
    schema = checked.json_object(given, "a tool's schema", MAX_TOOL_CHARS)
    function: object = schema
    if "function" in schema:
        function = schema["function"] if schema.get("type") == "function" else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"a tool's schema must be {_SHAPE}, got {checked.shorten_value(schema)}")
    name = checked.name(function["name"], "a tool's name")
    checked.text(function.get("description", ""), f"the description of tool {name!r}")
    if not isinstance(function.get("parameters", {}), dict):
        given = checked.shorten_value(function["parameters"])
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
        string.encode()  # raises for half a surrogate pair, which no server takes
    return strings


def checked_truth(given: object) -> GroundTruth:
    """Return a ground truth as it was declared. Raises TypeError or ValueError."""
    if isinstance(given, str):
        return checked.cut(checked.text(given, "a ground truth"), MAX_CALL_CHARS)
    calls = checked.items(given, "a ground truth, unless it is a str,", MAX_CALLS)
    return tuple(checked.record(each, ExpectedCall, "a ground truth's call") for each in calls)


class Environment(Protocol):
    """One episode: observe once, step until it is done or a limit ends it, then score once.

    Answer the policy's mistakes with an observation. Raise an exception only if the environment
    itself is at fault: the episode ends with `StopReason.ENVIRONMENT_ERROR`, is counted, and never
    becomes a reward.
    """

    def observe(self) -> Observation:
        """Return the opening of the episode. All episodes of a task must have the same one, because
        they share its prompt."""

    def step(self, action: str) -> StepResult:
        """Act on the policy's text of one turn, with its stop string, without end-of-turn token."""

    def score(self) -> Score:
        """Score the episode. Called once, also if a limit ended it."""


@runtime_checkable
class ClosableEnvironment(Environment, Protocol):
    """An environment that holds something open, such as a connection or a process."""

    def close(self) -> None:
        """Release it. Called once for every environment that was created, after its last other
        call, however that ended. A call beyond its deadline may still be running."""


class TaskSuite(Protocol):
    """A source of tasks: the `environment` of a config. Make it a frozen dataclass, so that `--set`
    can override its fields."""

    def tasks(self, split: str) -> Sequence[Task]:
        """Return the tasks of "train" or "test" in a fixed order."""

    def create(self, task: Task) -> Environment:
        """Return a new environment for one episode of the task. Called from worker threads, so
        environments must not share mutable state."""


@runtime_checkable
class KnowsGroundTruth(Protocol):
    """A suite with the optional method `ground_truth`. Runs record it, and the viewer shows it
    beside the episodes. Nothing else depends on it."""

    def ground_truth(self, task: Task) -> GroundTruth:
        """Return what solves the task: the calls in their order, or a text. Called from worker
        threads, once per task and run."""


@runtime_checkable
class LimitedSuite(TaskSuite, Protocol):
    """A suite that allows only so many environments at once."""

    def most_open(self) -> int:
        """Return the most environments that may be open at once, at least 1. A rollout creates no
        further one until another is closed."""


@runtime_checkable
class DemonstratingSuite(Protocol):
    """A suite that knows how its tasks are solved. This method is optional.

    `python -m jaxgrpo.check` plays the turns, and reports a task that they do not solve.
    """

    def demonstration(self, task: Task) -> Sequence[str]:
        """Return the texts of the policy's turns that solve the task, in order, each with its stop
        string."""
