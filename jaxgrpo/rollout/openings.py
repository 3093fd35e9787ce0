"""How the episodes of a task begin: the environment, what it observes first, and the prompt of that."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxgrpo.environment import Environment, Observation, TaskSuite
from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.user_code import FaultyEnvironmentError, ask, playable, returned
from jaxgrpo.types import Message, Task

_SHORT_CHARS = 20_000
"""Texts up to this length are rendered on the event loop, in about as many microseconds; longer ones
in a thread, so that other episodes need not wait."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """How the episodes of one task begin: their first observation, and the prompt that it is rendered to."""

    observation: Observation
    prompt_ids_P: np.ndarray


class PromptError(FaultyEnvironmentError):
    """An opening that is no prompt: the template refuses it, or it has more tokens than the settings
    allow, `tokens` or more of them."""

    def __init__(self, line: str, tokens: int = 0):
        super().__init__(line)
        self.tokens = tokens


@dataclasses.dataclass(frozen=True)
class Openings:
    """Opens tasks of a suite, with prompts of at most `max_prompt_tokens`."""

    suite: TaskSuite
    chat: Chat
    max_prompt_tokens: int
    calls: BlockingCalls

    async def begin(self, task: Task) -> tuple[Environment, Observation]:
        """A fresh environment for an episode, and its opening. Raises FaultyEnvironmentError."""
        of = f"of task {task.id!r}"
        made = await ask(self.calls, f"create() {of}", playable, self.suite.create, task)
        observed = returned(Observation)
        return made, await ask(self.calls, f"observe() {of}", observed, made.observe)

    async def open(self, task: Task) -> Opening:
        """The opening that all episodes of the task share. Raises FaultyEnvironmentError, and of its
        kinds PromptError for what cannot be a prompt here."""
        _, observation = await self.begin(task)
        messages, fewest = observation.messages, self.chat.fewest_tokens(observation.messages)
        if fewest > self.max_prompt_tokens:
            size = f"{characters(messages)} characters in {len(messages)} message(s)"
            raise self._too_long(task, fewest, f"{size}, {fewest} tokens or more")
        try:
            prompt_ids_P = await rendered(self.chat.opening, messages, observation.tools)
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
    """Of all the messages' contents."""
    return sum(len(message.content) for message in messages)


async def rendered(
    render: Callable[..., np.ndarray], messages: Sequence[Message], *args: object
) -> np.ndarray:
    """`render(messages, *args)`, without keeping the event loop from others for long."""
    if characters(messages) <= _SHORT_CHARS:
        return render(messages, *args)
    return await asyncio.to_thread(render, messages, *args)


def opens_differently(task: Task, one: Observation, other: Observation) -> str:
    """That two openings of a task differ, and where; "" when they are the same."""
    if one == other:
        return ""
    return (
        f"task {task.id!r} opens differently from one episode to the next, which then share no prompt: "
        f"{_difference(one, other)}"
    )


def _difference(one: Observation, other: Observation) -> str:
    """The first thing in which two openings differ."""
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
