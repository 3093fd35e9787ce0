"""Check the article's parts of BFCL's reward: how each treatment rewards the same episodes."""

import dataclasses
from typing import Any

import pytest

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.execution import Call, CallResult
from jaxgrpo.envs.bfcl.rewards import Correctness, Execution, Format, article_rewards
from jaxgrpo.envs.bfcl.scoring import missing_calls, state_match
from jaxgrpo.rewards.base import Function, RewardSettings
from jaxgrpo.run.setup import check_rewards
from jaxgrpo.types import Message, Score, StopReason, ToolCall, Trajectory
from tests.bfcl_fixtures import all_tasks, task, tool
from tests.episodes import episode
from tests.training import small_config

CD, MKDIR = ("cd", {"folder": "document"}), ("mkdir", {"dir_name": "temp"})
MV = ("mv", {"source": "final_report.pdf", "destination": "temp"})
WHY = "<reasoning>That comes first.</reasoning>\n"
SOLVED, END = WHY + tool(CD, MKDIR, MV), WHY + "<TASK_FINISHED>"
ALL = article_rewards(Execution(), Format(), Correctness())


def played(name: str, *texts: str, **options: Any) -> Trajectory:
    """Play an episode of a base task and score it, as in `played("base_0", SOLVED, END)`."""
    suite = Bfcl(**options)
    environment = suite.create(task(name, suite))
    messages, calls = list(environment.observe().messages), []
    for text in texts:
        result = environment.step(text)
        messages.append(Message("assistant", text))
        messages += result.observation.messages if result.observation else ()
        calls += result.calls
    return dataclasses.replace(
        episode([1], [2], [1], 0.0),
        messages=tuple(messages),
        calls=tuple(calls),
        turns=len(texts),
        stop_reason=result.stop_reason or StopReason.STEP_LIMIT,
        score=environment.score(),
    )


def parts(trajectory: Trajectory, rewards: RewardSettings = ALL) -> tuple[float, ...]:
    score = rewards.score(trajectory)
    return tuple(score.parts[name] for name in ("execution", "format", "correctness"))


EPISODES = {
    # (actions, (execution, format, correctness), rewards of the treatments below)
    "solved in form": ((SOLVED, END), (1.0, 1.0, 1.0), (1.4, 1.2, 1.0, 1.0)),
    "solved without reasoning": (
        (tool(CD, MKDIR, MV), "<TASK_FINISHED>"),
        (1.0, 0.0, 1.0),
        (1.2, 1.0, 1.0, 1.0),
    ),
    "solved, the end without reasoning": (
        (SOLVED, "<TASK_FINISHED>"),
        (1.0, 0.0, 1.0),
        (1.2, 1.0, 1.0, 1.0),
    ),
    "solved, with a call that fails": (
        (SOLVED, WHY + tool(MKDIR), END),
        (0.75, 1.0, 1.0),
        (1.35, 1.2, 1.0, 1.0),
    ),
    "solved, with calls that cannot be read": (
        (WHY + "<tool>[mkdir]</tool>", SOLVED, END),
        (0.75, 1.0, 1.0),
        (1.35, 1.2, 1.0, 1.0),
    ),
    "solved in another way": (  # the official check compares only state and results
        (WHY + tool(("cd", {"folder": "document/"}), MKDIR, MV), END),
        (1.0, 0.0, 0.0),
        (0.2, 0.0, 0.0, 1.0),
    ),
    "half done": ((WHY + tool(CD, MKDIR), END), (1.0, 0.0, 0.0), (0.2, 0.0, 0.0, 0.0)),
    "nothing tried": ((END,), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
}
TREATMENTS = (
    ALL,
    article_rewards(Format(), Correctness()),
    article_rewards(Correctness()),
    RewardSettings(),
)


@pytest.mark.parametrize("name", EPISODES)
def test_treatments_reward_the_episodes_differently(name: str) -> None:
    texts, expected, rewards = EPISODES[name]
    trajectory = played("base_0", *texts)
    assert parts(trajectory) == expected
    given = [treatment.score(trajectory).reward for treatment in TREATMENTS]
    assert given == pytest.approx(rewards, abs=1e-12)


def test_the_fraction_of_well_formed_turns_is_an_option() -> None:
    fraction = article_rewards(Execution(), Format(fraction=True), Correctness())
    assert parts(played("base_0", SOLVED, "<TASK_FINISHED>"), fraction) == (1.0, 0.5, 1.0)
    assert parts(played("base_0", tool(CD), "<TASK_FINISHED>"), fraction) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<reasoning></reasoning><tool>x</tool>", 1.0),
        ("<tool>x</tool> <reasoning>after\nwards</reasoning>", 1.0),
        ("<reasoning>I see.</reasoning> <TASK_ERROR>", 1.0),
        ("<reasoning>I see.</reasoning> <tool>x", 0.0),
        ("<reasoning>I see. <tool>x</tool>", 0.0),
        ("<reasoning>I see.</reasoning>", 0.0),
        ("<TASK_FINISHED>", 0.0),
    ],
)
def test_a_well_formed_turn_has_closed_reasoning_and_calls_or_an_end(
    text: str, kept: float
) -> None:
    right = Score(0.0, False, {"state_match": 1.0, "calls_match": 1.0})
    said = dataclasses.replace(
        episode([1], [2], [1], 0.0),
        messages=(Message("assistant", "an example"), Message("assistant", text)),
        turns=1,
    )
    assert Format()(said, right) == kept


def test_a_call_that_shows_an_error_did_not_succeed() -> None:
    calls = (
        ToolCall("ls", "{}", "two files", ok=True),
        ToolCall("cat", "{}", "An ERROR in the log", ok=True),
        ToolCall("cd", "{}", "a call must be an object", ok=False),
        ToolCall("pwd", "{}", "/", ok=True),
    )
    trajectory = dataclasses.replace(episode([1], [2], [1], 0.0), calls=calls)
    assert Execution()(trajectory, trajectory.score) == 0.5


def test_native_calls_that_cannot_be_read_are_attempts() -> None:
    texts = (
        "<tool_call>ls</tool_call>",
        '<tool_call>{"name": "ls", "arguments": {}}</tool_call>',
        "Done.",
    )
    trajectory = played("base_0", *texts, protocol="native")
    assert Execution()(trajectory, trajectory.score) == 0.5


def test_the_state_counts_by_class_and_calls_by_user_turn() -> None:
    suite = Bfcl(max_turns=2, reward="call_match")
    turns = suite.demonstration(task("base_0", suite))
    right = played("base_0", *turns, max_turns=2, reward="call_match").score.parts
    assert (right["state_match"], right["calls_match"]) == (1.0, 1.0)
    lazy = played("base_0", turns[0], *turns[1:2] * 2, max_turns=2, reward="call_match").score.parts
    assert (lazy["state_match"], lazy["calls_match"]) == (1.0, 0.5)  # the second turn only reads
    half = played("base_0", WHY + tool(CD), END).score.parts  # files differ, posts do not
    assert (half["state_match"], half["calls_match"]) == (0.5, 0.0)


def test_a_call_in_the_wrong_user_turn_does_not_count() -> None:
    suite = Bfcl(max_turns=2, reward="call_match")
    first, end, second, _ = suite.demonstration(task("base_0", suite))
    late = played("base_0", end, first, second, end, max_turns=2, reward="call_match")
    assert (late.score.reward, late.score.parts["calls_match"]) == (1.0, 0.5)
    assert parts(late)[2] == 0.0
    early = played("base_0", first, second, end, end, max_turns=2, reward="call_match")
    assert (early.score.reward, early.score.parts["calls_match"]) == (1.0, 0.5)


def test_every_demonstration_is_correct() -> None:
    suite = Bfcl(max_turns=99)
    wrong = []
    for each in all_tasks(suite):
        environment = suite.create(each)
        for text in suite.demonstration(each):
            environment.step(text)
        score = environment.score()
        if (score.parts["state_match"], score.parts["calls_match"]) != (1.0, 1.0):
            wrong.append((each.id, score))
    assert wrong == []


class Shelf:
    def __init__(self, books: object, _secret: int = 0) -> None:
        self.books, self._secret = books, _secret


def test_state_match_is_the_fraction_of_equal_simulators() -> None:
    policy = {"a": Shelf(["x"], 1), "b": Shelf([]), "c": Shelf(["y"]), "d": Shelf(1)}
    truth = {"a": Shelf(["x"], 2), "b": Shelf(["z"]), "c": Shelf(["y"]), "d": Shelf(2)}
    assert state_match(policy, truth) == 0.5
    assert state_match(policy, policy) == 1.0


def test_calls_are_missing_as_a_multiset_of_successes() -> None:
    call, other = Call("add", {"a": 1, "b": [2]}), Call("add", {"b": [2], "a": 2})
    same = Call("add", {"b": [2], "a": 1})
    made = [CallResult(same, "3", ok=True), CallResult(other, "no", ok=False)]
    assert missing_calls([call], made) == []
    assert missing_calls([call, call], made) == [("add", {"a": 1, "b": [2]})]
    assert missing_calls([other], made) == [("add", {"b": [2], "a": 2})]
    assert missing_calls([], []) == []


@pytest.mark.parametrize(
    ("environment", "functions", "said"),
    [
        (
            None,
            (Correctness(),),
            "rewards.Correctness: it judges episodes of jaxgrpo.envs.bfcl.Bfcl, "
            "but the environment is Letters",
        ),
        (
            Bfcl(protocol="native"),
            (Format(),),
            "rewards.Format: it is about the protocol 'tags', not 'native': leave it out",
        ),
    ],
)
def test_rewards_that_do_not_fit_the_environment_are_refused(
    environment: Bfcl | None, functions: tuple[Function, ...], said: str
) -> None:
    config = small_config("m")
    config = dataclasses.replace(
        config, environment=environment or config.environment, rewards=article_rewards(*functions)
    )
    with pytest.raises(ConfigError) as error:
        check_rewards(config)
    assert said in str(error.value)


def test_the_parts_fit_bfcl() -> None:
    config = dataclasses.replace(small_config("m"), environment=Bfcl(), rewards=ALL)
    check_rewards(config)
    assert config.rewards.parts == {
        "environment": 0.0,
        "execution": 0.2,
        "format": 0.2,
        "correctness": 1.0,
    }
