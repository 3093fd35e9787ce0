"""Reward functions beside the environment: sums, overrides, refusals, faults, and whole runs."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxgrpo.config.settings import Config
from jaxgrpo.rewards.base import Reward, RewardError, RewardFunction, RewardSettings
from jaxgrpo.types import Message, Score, StopReason, Trajectory
from tests.episodes import episode


def brevity(trajectory: Trajectory, score: Score) -> float:
    return -0.25 * int(trajectory.action_mask_C.sum())


def doubled(trajectory: Trajectory, score: Score) -> float:
    return 2 * score.reward


@dataclasses.dataclass(frozen=True)
class Shouting(RewardFunction):
    """A penalty that replaces the whole reward, and a part that does not."""

    parts = ("shouting", "polite")
    may_change = ("patience",)
    penalty: float = -1.0
    patience: int = 3

    def __call__(self, trajectory: Trajectory, score: Score) -> Reward:
        loud = [t for t in trajectory.policy_texts if t.isupper()]
        parts = {
            "shouting": self.penalty if loud else 0.0,
            "polite": 0.5 * ("please" in "".join(trajectory.policy_texts)),
        }
        return Reward(parts, self.penalty if loud else None, {"shouting": loud[0]} if loud else {})

    def problems(self, config: Config) -> list[str]:
        return ["no patience"] if self.patience == 0 else []


def played(*texts: str, reward: float = 1.0) -> Trajectory:
    """An episode of these texts after an opening with a worked example; three sampled tokens."""
    messages = [
        Message("user", "(example) hi"),
        Message("assistant", "AN EXAMPLE"),
        Message("user", "hi"),
    ]
    for text in texts:
        messages += [Message("assistant", text), Message("system", "GO ON")]
    blank = episode([1], [5, 6, 7, 8], [1, 1, 0, 1], reward)
    score = Score(reward, reward > 0.5, {"state": 1.0}, {"turn 0": "fine"})
    return dataclasses.replace(blank, messages=tuple(messages), turns=len(texts), score=score)


def test_the_policys_texts_are_not_those_of_the_opening() -> None:
    assert played("a", "b").policy_texts == ("a", "b")
    assert played().policy_texts == ()


def test_the_reward_is_the_weighted_sum_of_all_parts() -> None:
    rewards = RewardSettings((brevity, doubled), {"environment": 3, "brevity": 0.5})
    score = rewards.score(played("hi"))
    # 3 x 1 + 0.5 x (-0.25 x 3) + 1 x 2
    assert score.reward == 4.625
    assert dict(score.parts) == {"state": 1.0, "environment": 1.0, "brevity": -0.75, "doubled": 2.0}
    assert (score.passed, dict(score.notes)) == (True, {"turn 0": "fine"})


def test_weights_that_mean_the_same_are_the_same() -> None:
    same = [
        RewardSettings((brevity, doubled), weights)
        for weights in (
            {"doubled": 2, "environment": 0.5},
            (("environment", 0.5), ("doubled", 2.0)),
        )
    ]
    same.append(dataclasses.replace(same[0], weights=[("brevity", 1), *same[0].weights]))
    assert [rewards.weights for rewards in same] == [(("environment", 0.5), ("doubled", 2.0))] * 3
    assert len(set(same)) == 1


def test_without_functions_the_environments_reward_is_all() -> None:
    assert RewardSettings().is_environment_reward
    assert RewardSettings((), {"environment": 1}).is_environment_reward
    assert not RewardSettings((), {"environment": 0.5}).is_environment_reward
    assert RewardSettings((), {"environment": 0.5}).score(played("hi")).reward == 0.5


def test_an_override_replaces_the_whole_reward_and_the_verdict_stays() -> None:
    rewards = RewardSettings((doubled, Shouting()))
    assert rewards.score(played("please")).reward == 1 + 2 + 0.5
    score = rewards.score(played("hi", "HELLO"))
    assert (score.reward, score.passed) == (-1.0, True)
    assert score.parts["shouting"] == -1.0 and score.parts["doubled"] == 2.0
    assert score.notes == {
        "turn 0": "fine",
        "shouting": "HELLO",
        "override": "tests.rewards.test_base.Shouting gives -1.0 in place of 2.0",
    }


@dataclasses.dataclass(frozen=True)
class Harsh(RewardFunction):
    parts = ("harsh",)

    def __call__(self, trajectory: Trajectory, score: Score) -> Reward:
        return Reward({"harsh": 0.0}, override=-3.0)


def test_of_several_overrides_the_lowest_counts_in_any_order() -> None:
    for functions in ((Shouting(), Harsh()), (Harsh(), Shouting())):
        assert RewardSettings(functions).score(played("NO")).reward == -3.0


def test_a_function_of_weight_0_is_only_watched() -> None:
    watched = RewardSettings((Shouting(),), {"shouting": 0, "polite": 0})
    score = watched.score(played("HELLO"))
    assert (score.reward, score.parts["shouting"], score.notes["shouting"]) == (1.0, -1.0, "HELLO")
    half = RewardSettings((Shouting(),), {"shouting": 0})
    assert half.score(played("HELLO")).reward == -1.0


def raises(trajectory, score):
    return 1 / 0


def gives_text(trajectory, score):
    return "1.0"


def gives_nothing(trajectory, score):
    return None


def gives_nan(trajectory, score):
    return float("nan")


def gives_infinity(trajectory, score):
    return {"gives_infinity": np.float32("inf")}


def gives_a_part_too_many(trajectory, score):
    return {"gives_a_part_too_many": 1.0, "more": 1.0}


def gives_no_part(trajectory, score):
    return {}


def overrides_with_nan(trajectory, score):
    return Reward({"overrides_with_nan": 1.0}, override=float("nan"))


def notes_a_number(trajectory, score):
    return Reward({"notes_a_number": 1.0}, notes={"a": 1})


def state(trajectory, score):
    return 1.0


async def later(trajectory, score):
    return 1.0


FAULTY = {
    raises: "tests.rewards.test_base.raises raised ZeroDivisionError: division by zero",
    gives_text: "gives_text: parts['gives_text'] must be a finite number, got '1.0'",
    gives_nothing: "gives_nothing: parts['gives_nothing'] must be a finite number, got None",
    gives_nan: "gives_nan: parts['gives_nan'] must be a finite number from -1e+12 to",
    gives_infinity: "must be a finite number from -1e+12 to 1e+12, got np.float32(inf)",
    gives_a_part_too_many: "must give a number for each of its parts (gives_a_part_too_many), it",
    gives_no_part: "must give a number for each of its parts (gives_no_part), it gave {}",
    overrides_with_nan: "override must be a finite number from -1e+12 to 1e+12, got nan",
    notes_a_number: "notes_a_number: notes['a'] must be a str, got 1",
    state: "the environment's score has a part 'state' too",
}


@pytest.mark.parametrize("function", FAULTY, ids=lambda f: f.__name__)
def test_a_faulty_answer_is_an_error_that_names_the_function(function: Any) -> None:
    with pytest.raises(RewardError) as error:
        RewardSettings((function,)).score(played("hi"))
    assert FAULTY[function] in str(error.value)


def test_a_sum_that_overflows_is_an_error() -> None:
    with pytest.raises(RewardError, match="is too large"):
        RewardSettings((doubled,), {"doubled": 1e308}).score(played("hi", reward=100.0))


@pytest.mark.parametrize("answer", [True, np.float32(0.5), np.int64(2), np.bool_(True)])
def test_numbers_of_all_kinds_become_floats(answer: Any) -> None:
    score = RewardSettings((gives := _giving(answer),), {"environment": 0}).score(played("hi"))
    assert gives and type(score.reward) is float and score.reward == float(answer)
    assert type(score.parts["gives"]) is float


def _giving(answer, local=False):
    def gives(trajectory, score):
        return answer

    gives.__qualname__ = gives.__qualname__ if local else "gives"
    return gives


def one_argument(trajectory):
    return 1.0


@dataclasses.dataclass
class Thawed(RewardFunction):
    parts = ("thawed",)

    def __call__(self, trajectory, score):
        return 1.0


class Undecorated(Shouting):
    pass


@dataclasses.dataclass(frozen=True)
class Partless(RewardFunction):
    def __call__(self, trajectory, score):
        return 1.0


@dataclasses.dataclass(frozen=True)
class Twin(RewardFunction):
    parts = ("brevity",)

    def __call__(self, trajectory, score):
        return 1.0


def environment(trajectory, score):
    return 1.0


@pytest.mark.parametrize(
    ("functions", "weights", "said"),
    [
        (
            brevity,
            (),
            "functions must be a tuple of reward functions, such as (brevity,), got <function",
        ),
        (
            (3,),
            (),
            "3 is neither a function defined by name at the top level of a module nor an instance",
        ),
        ((lambda trajectory, score: 1.0,), (), "<lambda>"),
        ((_giving(1.0, local=True),), (), "neither a function defined by name at the top level"),
        ((Shouting,), (), "the reward function Shouting is a class: write Shouting()"),
        ((Thawed(),), (), "the reward function Thawed must be a frozen dataclass"),
        ((Undecorated(),), (), "the reward function Undecorated must be a frozen dataclass"),
        ((Partless(),), (), "Partless.parts must be a tuple of names such as ('brevity',), got ()"),
        (
            (one_argument,),
            (),
            "the reward function one_argument must take (trajectory, score): too many positional",
        ),
        ((brevity, brevity), (), "two reward functions are named brevity"),
        (
            (brevity, Twin()),
            (),
            "the reward part 'brevity' is given by brevity and Twin: rename one",
        ),
        (
            (environment,),
            (),
            "the reward part 'environment' is given by the environment and environment: rename one",
        ),
        (
            (brevity,),
            {"brevty": 1},
            "for 'brevty', but the parts are environment, brevity. Did you mean 'brevity'?",
        ),
        (
            (brevity,),
            {"brevity": -0.5},
            "the weight of brevity must be a number from 0 on, got -0.5",
        ),
        ((brevity,), {"brevity": "1"}, "the weight of brevity must be a number from 0 on, got '1'"),
        (
            (brevity,),
            {"brevity": float("nan")},
            "the weight of brevity must be a number from 0 on, got nan",
        ),
        ((brevity,), (("brevity", 1), ("brevity", 2)), "the weight of brevity is given twice"),
        (
            (brevity,),
            {"brevity": 0, "environment": 0},
            "the weights of all parts (environment, brevity) are 0: nothing is rewarded",
        ),
        (
            (),
            {"environment": 0},
            "the weights of all parts (environment) are 0: nothing is rewarded",
        ),
        ((brevity,), 2, "weights must be a dict such as {'environment': 0.5}, got 2"),
        (
            (brevity,),
            ("brevity",),
            "weights must be a dict such as {'environment': 0.5}, got ('brevity',)",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(functions: Any, weights: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        RewardSettings(functions, weights)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_stop_reasons_and_tokens_are_there_to_be_looked_at() -> None:
    trajectory = dataclasses.replace(played("hi"), stop_reason=StopReason.TOKEN_LIMIT)
    assert RewardSettings((overlong,)).score(trajectory).parts["overlong"] == -1.0


def overlong(trajectory: Trajectory, score: Score) -> float:
    assert trajectory.score is score
    return -1.0 if trajectory.overlong else 0.0
