"""The parts of the reward that the article's code gives BFCL's episodes, each as a reward function.

    rewards=article_rewards(Execution(), Format(), Correctness())     # all three
    rewards=article_rewards(Format(), Correctness())                  # any of them

In place of the environment's own reward, an episode then earns

    0.2 x execution + 0.2 x format + 1 x correctness

Source: Bespoke Labs' fork of verifiers, commit 1f4a267, `rubrics/bfcl_rubric.py`. At that commit
the addition of the format is commented out, as are the penalties for gibberish and for tool results
of the policy's own (`jaxgrpo/rewards/judge.py`, `jaxgrpo/rewards/penalties.py`).

Departures: an expected call with positional arguments has their names, and a user turn in which the
ground truth calls nothing is matched (there it never is).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from envs import tool_tags
from envs.bfcl.protocols import PROTOCOLS
from envs.bfcl.suite import Bfcl
from jaxgrpo.config.settings import Config
from jaxgrpo.rewards.base import ENVIRONMENT, Function, RewardFunction, RewardSettings, parts_of
from jaxgrpo.types import Score, Trajectory

ARTICLE_WEIGHTS = {"execution": 0.2, "format": 0.2, "correctness": 1.0}
_REASONED = re.compile(r"<reasoning>.*?</reasoning>", re.DOTALL)
_CALLED = re.compile(r"<tool>.*?</tool>", re.DOTALL)


def article_rewards(*functions: Function) -> RewardSettings:
    """The article's weights for its parts, 1 for parts of other functions, nothing for the
    environment's own reward."""
    given = [part for function in functions for part in parts_of(function)]
    weights = {part: weight for part, weight in ARTICLE_WEIGHTS.items() if part in given}
    return RewardSettings(functions, {ENVIRONMENT: 0.0, **weights})


@dataclasses.dataclass(frozen=True)
class _OfBfcl(RewardFunction):
    """A function that only BFCL's episodes can be given to."""

    def problems(self, config: Config) -> Sequence[str]:
        if isinstance(config.environment, Bfcl):
            return ()
        kind = type(config.environment).__name__
        return (f"it judges episodes of envs.bfcl.Bfcl, the environment is {kind}",)


@dataclasses.dataclass(frozen=True)
class Execution(_OfBfcl):
    """The share of the attempted calls that succeeded; 0 where none was attempted.

    A call succeeded when it did what it was asked to and the result that the policy was shown does
    not say "error", in letters of any case. Calls that cannot be read are one failed attempt.
    """

    parts: ClassVar[tuple[str, ...]] = ("execution",)

    def __call__(self, trajectory: Trajectory, score: Score) -> float:
        succeeded = [call.ok and "error" not in call.result.lower() for call in trajectory.calls]
        attempts = len(succeeded) + sum(map(_is_unreadable_call, trajectory.policy_texts))
        return sum(succeeded) / attempts if attempts else 0.0


def _is_unreadable_call(text: str) -> bool:
    if "<tool_call>" in text:
        return bool(PROTOCOLS["native"].parse(text).fault)
    return _CALLED.search(text) is not None and bool(tool_tags.parse_action(text).fault)


@dataclasses.dataclass(frozen=True)
class Format(_OfBfcl):
    """Whether a correct episode kept to the form of the protocol "tags": every turn of the policy
    has closed reasoning tags and, besides, a closed list of calls or an end mark. With `share`, the
    share of its turns that do. 0 where the episode is not correct (see Correctness)."""

    parts: ClassVar[tuple[str, ...]] = ("format",)
    share: bool = False

    def __call__(self, trajectory: Trajectory, score: Score) -> float:
        if not _is_correct(score):
            return 0.0
        kept = [_keeps_the_form(text) for text in trajectory.policy_texts]
        return sum(kept) / len(kept) if self.share else float(all(kept))

    def problems(self, config: Config) -> Sequence[str]:
        environment = config.environment
        if isinstance(environment, Bfcl) and environment.protocol != "tags":
            return (f"it is about the protocol 'tags', not {environment.protocol!r}: leave it out",)
        return super().problems(config)


def _keeps_the_form(text: str) -> bool:
    ended = tool_tags.FINISHED in text or tool_tags.GAVE_UP in text
    return _REASONED.search(text) is not None and (ended or _CALLED.search(text) is not None)


@dataclasses.dataclass(frozen=True)
class Correctness(_OfBfcl):
    """Whether at the end the public state of every simulator equals the ground truth's, and in
    every user turn the ground truth's calls, by name and arguments, are all among the successful
    ones."""

    parts: ClassVar[tuple[str, ...]] = ("correctness",)

    def __call__(self, trajectory: Trajectory, score: Score) -> float:
        return float(_is_correct(score))


def _is_correct(score: Score) -> bool:
    return 0.5 * score.parts["state_match"] + 0.5 * score.parts["calls_match"] == 1.0
