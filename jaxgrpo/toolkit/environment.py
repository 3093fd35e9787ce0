"""An environment made from typed Python functions.

Derive from `ToolEnvironment`. The public methods of the class are the tools. Its fields are the
state of one episode:

    @dataclasses.dataclass
    class Sums(ToolEnvironment):
        question: str
        answer: float
        given: float | None = None

        def first_message(self) -> str:
            return self.question

        def add(self, a: float, b: float) -> float:
            \"\"\"Add two numbers.\"\"\"
            return a + b

        def submit(self, result: float) -> str:
            \"\"\"Hand in the result.\"\"\"
            self.given = result
            self.end_episode()
            return "handed in"

        def score(self) -> Score:
            right = self.given == self.answer
            return Score(float(right), passed=right)

`jaxgrpo/toolkit/suite.py` lists tasks for it. `docs/environments.md` is the guide.
"""

import abc
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import pydantic_core

from jaxgrpo import checked
from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.toolkit import coroutines
from jaxgrpo.toolkit.calls import MAX_CALLS, Action, ToolRequest, run_in_order
from jaxgrpo.toolkit.functions import ArgumentsError, Tool, tool_of
from jaxgrpo.toolkit.protocols import ToolProtocol, protocol_of
from jaxgrpo.types import Message, Score, StopReason, ToolCall


class ToolError(Exception):
    """A tool refuses what the policy asked for. The message is the result that the policy sees."""


@dataclasses.dataclass(frozen=True)
class ToolLimits:
    """The limits of one episode.

    calls_per_turn   most calls of one policy turn. A turn with more is refused as a whole.
    result_chars     most characters of one result that the policy sees. Longer ones are cut, and
                     say so.
    async_seconds    time limit for one call of an async tool. The policy sees that it took too
                     long. A tool without `async` is limited by rollout.step_deadline_seconds alone,
                     and counts as an error of the environment if it exceeds that.
    """

    calls_per_turn: int = 16
    result_chars: int = 8_000
    async_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.calls_per_turn <= MAX_CALLS:
            raise ValueError(
                f"calls_per_turn must be from 1 to {MAX_CALLS}, got {self.calls_per_turn}"
            )
        if self.result_chars < 1 or not self.async_seconds > 0:
            raise ValueError("result_chars and async_seconds must be positive")


CLOSE = "close"
"""The method of jaxgrpo.environment.ClosableEnvironment, which a derived class may have."""


@dataclasses.dataclass
class _Episode:
    """What the base class remembers of an episode."""

    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    stop_reason: StopReason | None = None
    last_text: str = ""


class ToolEnvironment(abc.ABC):
    """One episode of a task, with tools. See the module's example.

    Every public method of a derived class is a tool, except those that are defined here, and
    `close`, which may release what an episode holds. Begin the name of any other method with an
    underscore. Each argument of a tool needs a type; its schema,
    checks and conversions are pydantic's. All methods of a derived class may be async.

    What a tool returns is shown to the policy: a str as it is, anything else as JSON. A tool that
    raises one of `tool_errors` has failed, and the policy sees the message. Any other exception is
    an error of the environment: the episode is retried and never becomes a reward.

    A list of calls is run up to the first that fails.
    """

    tools: ClassVar[Sequence[Callable[..., Any]]] = ()
    """Functions that are tools too."""
    protocol: Any = "native"
    """"native", "tags", or a `ToolProtocol`. A field of a derived class may replace it."""
    instructions: ClassVar[str] = ""
    """Text for the system message, below the instructions of the protocol."""
    limits: ToolLimits = ToolLimits()
    tool_errors: ClassVar[tuple[type[Exception], ...]] = (ToolError, ValueError, ArithmeticError)
    """Exceptions that the policy has caused: their message is the result of the call."""

    _episode: _Episode

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_episode", _Episode())  # needs no __init__ of a derived class
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("first_message", "next_message", "score", CLOSE):
            method = vars(cls).get(name)
            if inspect.iscoroutinefunction(method):
                setattr(cls, name, _blocking(method))

    # ---- for the derived class

    @abc.abstractmethod
    def first_message(self) -> str | Sequence[Message]:
        """Return the user's first message, or the opening messages after the system message. It
        must be the same in all episodes of a task."""

    def next_message(self, said: str) -> str | None:
        """Return the user's next message, after the policy has ended its turn and said this; None
        ends the episode."""
        return None

    @abc.abstractmethod
    def score(self) -> Score:
        """Score the episode. Called once, also if a limit ended it."""

    def end_episode(self, stop_reason: StopReason = StopReason.FINISHED) -> None:
        """End the episode after the call that is running. FAILED says that it is lost."""
        self._episode.stop_reason = StopReason(stop_reason)

    @property
    def made_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far, with their results."""
        return tuple(self._episode.calls)

    @property
    def last_text(self) -> str:
        """What the policy said in its last turn, without reasoning and marks."""
        return self._episode.last_text

    # ---- the environment's protocol

    def observe(self) -> Observation:
        """Return the opening: instructions, tools and the first message."""
        protocol = self._protocol
        instructions = "\n".join(filter(None, (protocol.instructions, self.instructions)))
        first = self.first_message()
        messages = (Message("user", first),) if isinstance(first, str) else tuple(first)
        schemas = [tool.schema for tool in tools_of(type(self)).values()]
        return protocol.opening(instructions, schemas, messages)

    def step(self, action: str) -> StepResult:
        """Read the policy's turn, run its calls, and answer."""
        episode, protocol = self._episode, self._protocol
        if episode.stop_reason is not None:
            raise RuntimeError("the episode is over: create a new environment")
        parsed = self._limited(protocol.parse(action))
        episode.last_text = protocol.said(action)
        if parsed.fault:
            return StepResult(observation=protocol.fault(parsed.fault))
        if parsed.finished or parsed.gave_up:
            return self._end_turn(parsed)
        calls = run_in_order(parsed.requests, self._run)
        if episode.stop_reason is not None:
            return StepResult(stop_reason=episode.stop_reason, calls=calls)
        left = len(parsed.requests) - len(calls)
        return StepResult(observation=protocol.results(calls, left), calls=calls)

    @property
    def _protocol(self) -> ToolProtocol:
        return protocol_of(self.protocol)

    def _limited(self, parsed: Action) -> Action:
        most, given = self.limits.calls_per_turn, len(parsed.requests)
        if given <= most:
            return parsed
        return Action(
            fault=f"There were {given} calls, at most {most} are allowed in one turn; "
            "nothing was done."
        )

    def _end_turn(self, parsed: Action) -> StepResult:
        following = None if parsed.gave_up else self.next_message(self._episode.last_text)
        if following is not None:
            return StepResult(observation=self._protocol.query(following))
        ended = StopReason.GAVE_UP if parsed.gave_up else StopReason.FINISHED
        self._episode.stop_reason = self._episode.stop_reason or ended
        return StepResult(stop_reason=self._episode.stop_reason)

    def _run(self, request: ToolRequest) -> ToolCall:
        """Run one call. One after the end of the episode is refused."""
        text, ok = (request.fault, False) if request.fault else self._outcome(request)
        arguments = json.dumps(dict(request.arguments), ensure_ascii=False)
        call = ToolCall(request.name, arguments, self._shown(text), ok)
        self._episode.calls.append(call)
        return call

    def _outcome(self, request: ToolRequest) -> tuple[str, bool]:
        tools = tools_of(type(self))
        tool = tools.get(request.name)
        if self._episode.stop_reason is not None:
            return "the episode is over", False
        if tool is None:
            name = checked.cut(request.name, checked.MAX_NAME)
            return f"there is no tool {name!r}; there are: {', '.join(tools)}", False
        try:
            arguments = tool.bind(request.arguments)
        except ArgumentsError as error:
            return str(error), False
        try:
            result = self._called(tool, arguments)
        except coroutines.LateError as error:
            return str(error), False
        except self.tool_errors as error:
            return str(error) or type(error).__name__, False
        return _as_text(result), True

    def _called(self, tool: Tool, arguments: dict[str, Any]) -> object:
        owner = (self,) if tool.is_method else ()
        answer = tool.function(*owner, **arguments)
        if not inspect.iscoroutine(answer):
            return answer
        return coroutines.wait_for(answer, self.limits.async_seconds)

    def _shown(self, text: str) -> str:
        most = self.limits.result_chars
        if len(text) <= most:
            return text
        return f"{text[:most]}... ({len(text) - most} characters left out)"


def _blocking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a coroutine function, so that its caller waits."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        return coroutines.wait_for(function(*args, **kwargs))

    return call


@functools.cache
def tools_of(environment: type[ToolEnvironment]) -> dict[str, Tool]:
    """Return the tools of a class by name: its public methods in the order of their definition,
    then its static methods, then its `tools`. Raises TypeError, which names the function, if one
    cannot be a tool."""
    methods: dict[str, Any] = {}
    for base in reversed(environment.__mro__):
        if not issubclass(ToolEnvironment, base):  # neither ToolEnvironment nor above it
            methods |= {name: member for name, member in vars(base).items() if _is_public(name)}
    found = [
        tool_of(member, is_method=True) for member in methods.values() if inspect.isfunction(member)
    ]
    found += [tool_of(m.__func__) for m in methods.values() if isinstance(m, staticmethod)]
    found += [tool_of(function) for function in environment.tools]
    named = {tool.name: tool for tool in found}
    if not named:
        raise TypeError(
            f"{environment.__qualname__} has no tools: a public method is one, and so is a "
            "function in its `tools`"
        )
    if len(named) < len(found):
        names = [tool.name for tool in found]
        repeated = next(name for name in names if names.count(name) > 1)
        raise TypeError(f"{environment.__qualname__} has two tools named {repeated!r}: rename one")
    return named


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name not in vars(ToolEnvironment) and name != CLOSE


def _as_text(result: object) -> str:
    """Return a str as it is, and anything else as JSON."""
    if isinstance(result, str):
        return str.__str__(result)
    return pydantic_core.to_json(
        result, fallback=str, bytes_mode="base64", inf_nan_mode="constants"
    ).decode()
