"""The parts of the article's reward for BFCL's episodes, each as a reward function.

    rewards=article_rewards(Execution(), Format(), Correctness())     # all three
    rewards=article_rewards(Format(), Correctness())                  # any of them

The reward of an episode is then, instead of the environment's own,

    0.2 x execution + 0.2 x format + 1 x correctness

Source: Bespoke Labs' fork of verifiers, commit 1f4a267, `rubrics/bfcl_rubric.py`. In that commit
the format's part is commented out, and so are the penalties for gibberish and for forged tool
results (`jaxgrpo/rewards/judge.py`, `jaxgrpo/rewards/penalties.py`).

Departures: positional arguments of expected calls are given their names. A user turn in which the
ground truth calls nothing counts as matched; there it never does.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from jaxgrpo.config.settings import Config
from jaxgrpo.envs.bfcl.protocols import PROTOCOLS
from jaxgrpo.envs.bfcl.suite import Bfcl
from jaxgrpo.rewards.base import ENVIRONMENT, Function, RewardFunction, RewardSettings, parts_of
from jaxgrpo.toolkit import tags
from jaxgrpo.types import Score, Trajectory

ARTICLE_WEIGHTS = {"execution": 0.2, "format": 0.2, "correctness": 1.0}
_REASONED = re.compile(r"<reasoning>.*?</reasoning>", re.DOTALL)
_CALLED = re.compile(r"<tool>.*?</tool>", re.DOTALL)


def article_rewards(*functions: Function) -> RewardSettings:
    """Weight the parts as the article does, and parts of other functions by 1.

    The environment's own reward has weight 0.
    """
    given = [part for function in functions for part in parts_of(function)]
    weights = {part: weight for part, weight in ARTICLE_WEIGHTS.items() if part in given}
    return RewardSettings(functions, {ENVIRONMENT: 0.0, **weights})


@dataclasses.dataclass(frozen=True)
class _OfBfcl(RewardFunction):
    """A reward function for BFCL's episodes only."""

    def problems(self, config: Config) -> Sequence[str]:
        if isinstance(config.environment, Bfcl):
            return ()
        kind = type(config.environment).__name__
        return (f"it judges episodes of jaxgrpo.envs.bfcl.Bfcl, but the environment is {kind}",)


@dataclasses.dataclass(frozen=True)
class Execution(_OfBfcl):
    """The fraction of attempted calls that succeeded, or 0 without an attempt.

    A call succeeded if the simulator says so and the result that the policy saw does not contain
    "error", in any case of letters. A list of calls that cannot be parsed is one failed attempt.
    """

    parts: ClassVar[tuple[str, ...]] = ("execution",)

    def __call__(self, trajectory: Trajectory, score: Score) -> float:
        succeeded = [call.ok and "error" not in call.result.lower() for call in trajectory.calls]
        attempts = len(succeeded) + sum(map(_is_unreadable_call, trajectory.policy_texts))
        return sum(succeeded) / attempts if attempts else 0.0


def _is_unreadable_call(text: str) -> bool:
    if "<tool_call>" in text:
        return bool(PROTOCOLS["native"].parse(text).fault)
    return _CALLED.search(text) is not None and bool(tags.parse_action(text).fault)


@dataclasses.dataclass(frozen=True)
class Format(_OfBfcl):
    """1 if all turns of a correct episode are well-formed in the protocol "tags", else 0.

    A well-formed turn has closed reasoning tags, and a closed list of calls or an end mark. With
    `fraction`, the value is the fraction of well-formed turns. It is 0 if the episode is not
    correct (see Correctness).
    """

    parts: ClassVar[tuple[str, ...]] = ("format",)
    fraction: bool = False

    def __call__(self, trajectory: Trajectory, score: Score) -> float:
        if not _is_correct(score):
            return 0.0
        kept = [_keeps_the_form(text) for text in trajectory.policy_texts]
        return sum(kept) / len(kept) if self.fraction else float(all(kept))

    def problems(self, config: Config) -> Sequence[str]:
        environment = config.environment
        if isinstance(environment, Bfcl) and environment.protocol != "tags":
            return (f"it is about the protocol 'tags', not {environment.protocol!r}: leave it out",)
        return super().problems(config)


def _keeps_the_form(text: str) -> bool:
    ended = tags.FINISHED in text or tags.GAVE_UP in text
    return _REASONED.search(text) is not None and (ended or _CALLED.search(text) is not None)


@dataclasses.dataclass(frozen=True)
class Correctness(_OfBfcl):
    """1 if the final state and the calls match the ground truth, else 0.

    The public state of every simulator must equal the ground truth's. In every user turn, the
    ground truth's calls (name and arguments) must be among the successful ones.
    """

    parts: ClassVar[tuple[str, ...]] = ("correctness",)

    def __call__(self, trajectory: Trajectory, score: Score) -> float:
        return float(_is_correct(score))


def _is_correct(score: Score) -> bool:
    return 0.5 * score.parts["state_match"] + 0.5 * score.parts["calls_match"] == 1.0
