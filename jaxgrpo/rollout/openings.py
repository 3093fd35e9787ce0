"""Open tasks: create the environment, take its first observation, render the prompt, and close."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np

from jaxgrpo.environment import (
    ClosableEnvironment,
    Environment,
    LimitedSuite,
    Observation,
    TaskSuite,
)
from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.user_code import (
    FaultyEnvironmentError,
    call_user_code,
    check_environment,
    record_check,
)
from jaxgrpo.types import Message, Task

_SHORT_CHARS = 20_000
"""Texts up to this length are rendered on the event loop, at about one microsecond per character.
Longer ones are rendered in a thread, so that other episodes need not wait."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """The first observation of a task's episodes, and its prompt [P]."""

    observation: Observation
    prompt_ids_P: np.ndarray


class PromptError(FaultyEnvironmentError):
    """The opening gives no prompt: the template refuses it, or it is too long. Then it has at least
    `tokens` tokens."""

    def __init__(self, line: str, tokens: int = 0):
        super().__init__(line)
        self.tokens = tokens


Places = contextlib.AbstractAsyncContextManager[object]
"""Entered before an environment is created, and left after it is closed."""


def places_of(suite: TaskSuite) -> Places:
    """Return the places for a suite's open environments. They belong to one event loop."""
    if isinstance(suite, LimitedSuite):
        return asyncio.Semaphore(suite.most_open())
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Openings:
    """Opens tasks of a suite, with prompts of at most `max_prompt_tokens`."""

    suite: TaskSuite
    chat: Chat
    max_prompt_tokens: int
    calls: BlockingCalls
    places: Places = contextlib.nullcontext()

    @contextlib.asynccontextmanager
    async def begin(self, task: Task) -> AsyncIterator[tuple[Environment, Observation]]:
        """Create an environment for an episode, and yield it with its first observation. At the
        end, close it if it can be closed. Raises FaultyEnvironmentError, also if closing fails."""
        of = f"of task {task.id!r}"
        async with self.places:
            made = await call_user_code(
                self.calls, f"create() {of}", check_environment, self.suite.create, task
            )
            try:
                observed, what = record_check(Observation), f"observe() {of}"
                yield made, await call_user_code(self.calls, what, observed, made.observe)
            except BaseException:
                with contextlib.suppress(FaultyEnvironmentError):  # the first fault is the one told
                    await self._close(made, of)
                raise
            await self._close(made, of)

    async def _close(self, made: Environment, of: str) -> None:
        if isinstance(made, ClosableEnvironment):
            await call_user_code(self.calls, f"close() {of}", lambda _: None, made.close)

    async def open(self, task: Task) -> Opening:
        """Return the opening that all episodes of the task share. Raises FaultyEnvironmentError,
        and its subclass PromptError if the opening gives no prompt."""
        async with self.begin(task) as (_, observation):
            pass
        messages, fewest = observation.messages, self.chat.fewest_tokens(observation.messages)
        if fewest > self.max_prompt_tokens:
            size = f"{characters(messages)} characters in {len(messages)} message(s)"
            raise self._too_long(task, fewest, f"{size}, {fewest} tokens or more")
        try:
            prompt_ids_P = await render_without_blocking(
                self.chat.opening, messages, observation.tools
            )
        except Exception as error:  # the edge to the model's template, with the users' texts in it
            raise PromptError(f"the prompt of task {task.id!r}: {error}") from error
        prompt_ids_P.flags.writeable = False  # all the task's episodes hold this one
        if len(prompt_ids_P) > self.max_prompt_tokens:
            raise self._too_long(task, len(prompt_ids_P), f"{len(prompt_ids_P)} tokens")
        return Opening(observation, prompt_ids_P)

    def _too_long(self, task: Task, tokens: int, size: str) -> PromptError:
        return PromptError(
            f"the prompt of task {task.id!r} has {size}, and rollout.max_prompt_tokens is "
            f"{self.max_prompt_tokens}: raise it, or make the environment's prompts shorter",
            tokens,
        )


def characters(messages: Sequence[Message]) -> int:
    """Count the characters of all messages."""
    return sum(len(message.content) for message in messages)


async def render_without_blocking(
    render: Callable[..., np.ndarray], messages: Sequence[Message], *args: object
) -> np.ndarray:
    """Call `render(messages, *args)` without blocking the event loop for long."""
    if characters(messages) <= _SHORT_CHARS:
        return render(messages, *args)
    return await asyncio.to_thread(render, messages, *args)


def describe_difference(task: Task, one: Observation, other: Observation) -> str:
    """Describe how two openings of a task differ; return "" if they are the same."""
    if one == other:
        return ""
    return (
        f"task {task.id!r} opens differently from one episode to the next, which then share no "
        f"prompt: {_difference(one, other)}"
    )


def _difference(one: Observation, other: Observation) -> str:
    """Describe the first difference of two openings."""
    for i, (was, now) in enumerate(zip(one.messages, other.messages, strict=False)):
        if was != now:
            pairs = enumerate(zip(was.content, now.content, strict=False))
            same = next(
                (n for n, (a, b) in pairs if a != b), min(len(was.content), len(now.content))
            )
            at = max(0, same - 20)
            first, second = (f"{m.role} says {m.content[at : at + 60]!r}" for m in (was, now))
            return f"in message {i} {first} and then {second}"
    if len(one.messages) != len(other.messages):
        return f"{len(one.messages)} message(s) and then {len(other.messages)}"
    return "the tools" if one.tools != other.tools else "the stop strings"
