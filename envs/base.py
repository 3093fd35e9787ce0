"""What an environment is: one class that observes, steps and scores, and a suite that lists tasks and creates one for each episode."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy sees now.

    The first observation of an episode holds the whole opening (system prompt, first query) and, when the model's own tool-call form is
    used, the JSON schemas of the tools for the chat template. Every later one holds only the new messages. `stop_strings` end the policy's
    next turn and are kept in its text; the end-of-turn token always ends it.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(message, Message) for message in self.messages):
            raise TypeError(f"an observation's messages must be of Message, got {self.messages!r}")


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one policy turn led to: exactly one of `observation` (the episode goes on) and `stop_reason` (it is over) is set."""

    observation: Observation | None = None
    stop_reason: StopReason | None = None
    calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        if (self.observation is None) == (self.stop_reason is None):
            raise ValueError("a step either observes or stops: set exactly one of observation and stop_reason")
        answer = self.stop_reason if self.observation is None else self.observation
        if not isinstance(answer, Observation | StopReason):
            raise TypeError(f"a step gives an Observation or a StopReason, got {answer!r}")

    @property
    def done(self) -> bool:
        return self.stop_reason is not None


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
