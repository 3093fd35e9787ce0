"""A game for a language model: find a number from 1 to 9. Replace it with your own environment.

The suite lists the tasks and creates one environment per episode. The environment observes, steps
and scores.
"""

import dataclasses
from typing import Any

from jaxgrpo import Message, Observation, Score, StepResult, StopReason, Task

ANY_CHARACTER = (*map(chr, range(128)), "\ufffd")
"""A turn ends after its first character: the tiny model cannot yet write more."""


@dataclasses.dataclass(frozen=True)
class GuessTheNumber:
    """The fields are settings: `--set environment.guesses=5`."""

    guesses: int = 4

    def tasks(self, split: str) -> list[Task]:
        """Return the tasks of a split. Every fourth range is held out as the split `test`."""
        ranges = [(low, high) for low in range(1, 8) for high in range(low + 2, 10)]
        chosen = [r for i, r in enumerate(ranges) if (i % 4 == 0) == (split == "test")]
        return [
            Task(f"from_{low}_to_{high}_is_{number}", payload=(low, high, number))
            for low, high in chosen
            for number in range(low, high + 1)
        ]

    def create(self, task: Task) -> "Game":
        """Return the environment of one episode."""
        payload: Any = task.payload
        low, high, number = payload
        return Game(low, high, number, self.guesses)


class Game:
    """One episode of the game."""

    def __init__(self, low: int, high: int, number: int, guesses: int):
        self.low, self.high, self.number, self.guesses = low, high, number, guesses
        self.tried: list[str] = []

    def observe(self) -> Observation:
        """Open the episode."""
        return self.say(f"Guess my number, from {self.low} to {self.high}.")

    def step(self, action: str) -> StepResult:
        """Answer one turn of the policy. A bad turn gets an answer too: an exception would mean
        that the environment itself is broken."""
        guess = action.strip()[:1]
        self.tried.append(guess)
        if guess == str(self.number):
            return StepResult(stop_reason=StopReason.FINISHED)
        if len(self.tried) >= self.guesses:
            return StepResult(stop_reason=StopReason.FAILED)
        if guess not in set("123456789"):
            return StepResult(observation=self.say("digit?"))
        return StepResult(observation=self.say("higher" if int(guess) < self.number else "lower"))

    def score(self) -> Score:
        """Reward early success most. Different digits earn a little, so that a beginner's episodes
        differ: a group with equal rewards teaches nothing."""
        if self.tried and self.tried[-1] == str(self.number):
            return Score(1 - (len(self.tried) - 1) / self.guesses, passed=True)
        return Score(0.05 * len(set(self.tried) & set("123456789")), passed=False)

    def say(self, text: str) -> Observation:
        return Observation((Message("user", text),), stop_strings=ANY_CHARACTER)
