"""Toy environments on OpenEnv's base classes, played in process and by URL on OpenEnv's server.

python -m pytest -m openenv tests/envs/test_openenv_sessions.py
"""

import dataclasses
from typing import Any

import pytest

from jaxgrpo.config.settings import ConfigError, RolloutSettings
from jaxgrpo.environment import Observation
from jaxgrpo.envs.openenv.sessions import OpenEnvError
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.task_check import TaskCheck
from jaxgrpo.types import Message, Score, StopReason
from tests.byte_chat import byte_tokenizer
from tests.openenv_play import WAYS, call, guess, play, shown

pytestmark = pytest.mark.openenv


@pytest.mark.parametrize("way", WAYS)
def test_an_action_is_played_as_one_tool(suite_of: Any, way: str) -> None:
    seen, score = play(
        suite_of("Guess", way, train_size=2),  # the number of seed 0 is 13, but 13 is refused
        "Hm.",
        guess(0),
        guess(2, colour="red"),
        call("guess"),
        "<tool_call>",
        guess(2),
        guess(4),
        guess(19),
    )
    opening = seen[0]
    assert opening.messages[1] == Message("user", "hint: From 1 to 20.\nleft: 3")
    assert [tool["function"]["name"] for tool in opening.tools] == ["guess_number"]
    assert shown(seen) == [
        "There was no call of guess_number; nothing was done.",
        "Error: guess: Input should be greater than or equal to 1",
        "Error: colour: Extra inputs are not permitted",
        "Error: there is no tool named 'guess'; the only one is 'guess_number'",
        "The tool call was not closed with </tool_call>; nothing was done.",
        "hint: higher\nleft: 2",
        "hint: higher\nleft: 1",
        "failed",
    ]
    assert [c.ok for result in seen[1:] for c in result.calls] == [False] * 3 + [True] * 3
    assert score == Score(-0.75, False)


@pytest.mark.parametrize("way", WAYS)
def test_several_calls_of_a_turn_are_played_up_to_the_end(suite_of: Any, way: str) -> None:
    suite = suite_of("ListedGuess", way, passing_reward=0.5)
    seen, score = play(suite, guess(9) + guess(3) + guess(5), index=2)
    (_, end) = seen
    assert end.stop_reason is StopReason.FINISHED
    assert [c.result for c in end.calls] == ["hint: lower\nleft: 2", "hint: right\nleft: 1"]
    assert score == Score(0.5, True)
    seen, _ = play(suite, guess(9) + guess(0) + guess(3), index=2)
    assert shown(seen) == [
        "hint: lower\nleft: 2|Error: guess: Input should be greater than or equal to 1|"
        "not run: an earlier call failed"
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("reward", "expected"), [("sum", 0.5), ("last", 0.75)])
def test_rewards_are_added_up_or_the_last_counts(
    suite_of: Any, way: str, reward: str, expected: float
) -> None:
    suite = suite_of("ListedGuess", way, reward=reward)
    _, score = play(suite, guess(9), guess(2), index=1)
    assert score == Score(expected, False)
    assert play(suite)[1] == Score(0.0, False)  # a limit ended it before the first step


@pytest.mark.parametrize("way", WAYS)
def test_tools_of_the_environment_are_shown_and_called(suite_of: Any, way: str) -> None:
    suite = suite_of("Desk", way, train_size=2)
    seen, score = play(
        suite,
        call("add", a=1, b=2) + call("subtract", a=1) + call("add", a=1, b=1),
        call("add", a="x", b=2),
        call("answer", value=59 + 63),
    )  # the numbers of seed 0
    assert seen[0].messages[1] == Message("user", "What is 59 + 63?")
    assert seen[0].tools[0]["function"] == {
        "name": "add",
        "description": "Add two numbers. Both are whole.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
    first, second, last = shown(seen)
    assert first == "3|Error: Unknown tool: 'subtract'|not run: an earlier call failed"
    assert "Input should be a valid integer" in second
    assert (last, score) == ("finished", Score(1.0, True))
    seen, score = play(suite, "I cannot say.")
    assert (shown(seen), score) == (["finished"], Score(0.0, False))


@pytest.mark.parametrize("way", WAYS)
def test_tools_in_tags(suite_of: Any, way: str) -> None:
    suite = suite_of("Desk", way, train_size=2, protocol="tags")
    answer = '<tool>[{"name": "answer", "args": {"value": 122}}]</tool>'
    seen, score = play(suite, "no call", answer)
    system = seen[0].messages[0].content
    assert seen[0].tools == () and "\nadd(a: int, b: int): Add two numbers." in system
    assert "nothing was done" in shown(seen)[0] and score.reward == 1
    assert play(suite, "<TASK_ERROR>")[0][1].stop_reason is StopReason.GAVE_UP


@pytest.mark.parametrize("way", WAYS)
def test_text_goes_into_a_field(suite_of: Any, way: str) -> None:
    suite = suite_of(
        "Letters", way, text_field="text", train_size=3, seed=5, stop_strings=("</x>",)
    )
    seen, score = play(suite, "abc", index=1)
    assert seen[0] == Observation((Message("user", "letter 6"),), stop_strings=("</x>",))
    assert (shown(seen), score) == (["finished"], Score(1.0, True))
    seen, score = play(suite, "<tool_call>")
    assert (shown(seen), score) == (["failed"], Score(0.0, False))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_when_a_limit_ends_the_episode_can_be_set(suite_of: Any, way: str) -> None:
    final = {"guess": 3}
    suite = suite_of("ListedGuess", way, final_action=final)
    assert play(suite, guess(5), index=2)[1].reward == 0.5
    assert play(suite, guess(3), index=2)[1].reward == 0.75  # it is over already


@pytest.mark.parametrize("way", WAYS)
def test_tasks_are_those_that_the_environment_lists(suite_of: Any, way: str) -> None:
    suite = suite_of("ListedGuess", way, test_split="held_out")
    train, test = suite.tasks("train"), suite.tasks("test")
    assert [task.id for task in train] == ["train_0", "train_1", "train_2", "train_3"]
    assert [(task.id, task.labels) for task in test] == [
        ("number_17", ("big",)),
        ("number_18", ("big",)),
    ]
    assert suite.tasks("held_out") == test  # other splits are the environment's own
    seeds = [task.payload["seed"] for task in [*train, *test]]  # type: ignore[index]
    assert seeds == [0, 1, 2, 3, 1_000_000, 1_000_001]
    assert len(suite_of("ListedGuess", way, train_size=2).tasks("train")) == 2


@pytest.mark.parametrize("way", WAYS)
def test_tasks_are_arguments_of_reset_or_seeds(suite_of: Any, way: str) -> None:
    suite = suite_of("Guess", way, train=({"low": 7}, {"low": 9, "seed": 77}), test_size=2)
    assert [task.payload for task in suite.tasks("train")] == [
        {"seed": 0, "low": 7},
        {"seed": 77, "low": 9},
    ]
    assert [task.payload for task in suite.tasks("test")] == [
        {"seed": 1_000_000},
        {"seed": 1_000_001},
    ]
    assert play(suite, index=1)[0][0].messages[1].content.startswith("hint: From 9 to 20.")
    with pytest.raises(
        OpenEnvError,
        match=r"no tasks of the train split: .*; set train to arguments of reset, or train_size",
    ):
        suite_of("Guess", way).tasks("train")


@pytest.mark.parametrize("way", WAYS)
def test_only_the_wanted_fields_are_shown(suite_of: Any, way: str) -> None:
    seen, _ = play(suite_of("Guess", way, train_size=1, fields=("hint",)), guess(2))
    assert [seen[0].messages[1].content, *shown(seen)] == ["From 1 to 20.", "higher"]


@pytest.mark.parametrize("way", WAYS)
def test_an_opening_that_ignores_the_seed_is_an_error_of_the_task(suite_of: Any, way: str) -> None:
    suite = suite_of("UnseededGuess", way, train_size=2)
    suite = dataclasses.replace(suite, protocol="tags")
    check = TaskCheck(suite, RolloutSettings())
    with pytest.raises(ConfigError, match="task 'train_0' opens differently from one episode to"):
        check.open_tasks(Chat(byte_tokenizer()), suite.tasks("train"))
    sound = dataclasses.replace(suite, fields=("left",))
    opened = TaskCheck(sound, RolloutSettings()).open_tasks(
        Chat(byte_tokenizer()), sound.tasks("train")
    )
    assert all(isinstance(tokens, int) for tokens in opened.found.values())
