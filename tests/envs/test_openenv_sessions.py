"""Toy environments on OpenEnv's base classes, played in process and by URL on OpenEnv's server.

python -m pytest -m openenv tests/envs/test_openenv_sessions.py
"""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxgrpo.config.settings import ConfigError, RolloutSettings
from jaxgrpo.environment import Observation
from jaxgrpo.envs.openenv import OpenEnv
from jaxgrpo.envs.openenv.sessions import OpenEnvError
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.rollout import Rollout
from jaxgrpo.rollout.task_check import TaskCheck
from jaxgrpo.types import Message, Score, StopReason, Task
from tests.byte_chat import byte_tokenizer
from tests.rollout_fakes import Say, ScriptedSampler

pytestmark = pytest.mark.openenv

WAYS = ("in process", "by URL")


@pytest.fixture
def toys() -> Iterator[Any]:
    """The toys, of which none may be open in the end."""
    from tests import openenv_toys

    openenv_toys.Guess.open_now.clear()
    yield openenv_toys
    until(lambda: not openenv_toys.Guess.open_now)


@pytest.fixture
def suite_of(toys: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., OpenEnv]]:
    """Makes the suite of a toy, which runs in process or on a server."""
    served = []

    def suite_of(kind: str, way: str, allowed: int = 8, **settings: Any) -> OpenEnv:
        if way == "in process":
            return OpenEnv(f"tests.openenv_toys:{kind}", **settings)
        serving = toys.serving(toys.application(getattr(toys, kind), allowed))
        served.append(serving)
        url, _ = serving.__enter__()
        return OpenEnv(url, **settings)

    yield suite_of
    for serving in served:
        serving.__exit__(None, None, None)


def until(true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def guess(number: Any, **more: Any) -> str:
    return call("guess_number", guess=number, **more)


def play(suite: OpenEnv, *turns: str, index: int = 0) -> tuple[list[Any], Score]:
    """Play a task of the train split; return what was seen, and the score."""
    environment: Any = suite.create(suite.tasks("train")[index])
    seen: list[Any] = [environment.observe()]
    for turn in turns:
        seen.append(environment.step(turn))
    score = environment.score()
    environment.close()
    return seen, score


def shown(seen: list[Any]) -> list[str]:
    """What the policy saw after its turns, or why the episode ended."""
    return [
        result.stop_reason.value
        if result.stop_reason
        else "|".join(message.content for message in result.observation.messages)
        for result in seen[1:]
    ]


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


def rollout(suite: OpenEnv, *guesses: int) -> Any:
    """Play three episodes of each task."""
    turns = [
        f'<tool>[{{"name": "guess_number", "args": {{"guess": {n}}}}}]</tool>' for n in guesses
    ]
    suite = dataclasses.replace(suite, protocol="tags")
    settings = RolloutSettings(max_turns=9, max_retries=0)
    rollout = Rollout(
        ScriptedSampler([Say(turn) for turn in turns]),
        suite,
        Chat(byte_tokenizer()),
        9000,
        settings,
    )
    return asyncio.run(rollout.groups(suite.tasks("train"), 3, 0, "step-1"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["Guess", "LoneGuess"])
def test_no_more_sessions_are_open_than_are_supported(
    toys: Any, suite_of: Any, way: str, kind: str
) -> None:
    lone = kind == "LoneGuess"
    sessions = 1 if lone else 4
    suite = suite_of(kind, way, sessions, train_size=2, sessions=0 if lone else 4)
    assert not lone or suite.most_open() == 1  # also by URL, where it is not known
    getattr(toys, kind).most_open = 0
    result = rollout(suite, 2, 2, 2)
    assert [group.rewards_G.tolist() for group in result.groups] == [[-0.75] * 3] * 2
    assert (getattr(toys, kind).most_open == 1) == lone
    assert getattr(toys, kind).most_open <= sessions


def test_sessions_that_the_environment_does_not_support_are_refused() -> None:
    with pytest.raises(
        OpenEnvError, match=r"sessions is 2, but tests.openenv_toys:LoneGuess does not"
    ):
        OpenEnv("tests.openenv_toys:LoneGuess", train_size=1, sessions=2).tasks("train")


def test_a_full_server_is_waited_for_and_then_named(suite_of: Any) -> None:
    suite = suite_of("Guess", "by URL", 1, train_size=1, timeout_seconds=2)
    (task,) = suite.tasks("train")
    first, second, third = (suite.create(task) for _ in range(3))
    first.observe()
    with pytest.raises(OpenEnvError, match=r"has all its 1 session\(s\) in use: set sessions to"):
        second.observe()
    threading.Timer(0.2, first.close).start()
    third.observe()
    second.close()
    third.close()


@pytest.mark.parametrize("restarts", [False, True])
def test_a_server_that_is_lost_is_an_error_of_the_environment(toys: Any, restarts: bool) -> None:
    app = toys.application(toys.Guess)
    with toys.serving(app) as (url, end):
        suite = OpenEnv(url, train_size=1)
        environment: Any = suite.create(suite.tasks("train")[0])
        environment.observe()
        end()
        port = int(url.rpartition(":")[2])
        with toys.serving(app, port if restarts else 0):
            for _ in range(2):  # it does not go on in a session that was never reset
                with pytest.raises(OpenEnvError, match=r"the session at .* was lost during step"):
                    environment.step(guess(2))
            environment.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_raises_is_an_error_of_the_environment(suite_of: Any, way: str) -> None:
    result = rollout(suite_of("Guess", way, train_size=1, sessions=3), 2, 20)
    (dropped,) = result.dropped
    assert (
        "the machine broke" in dropped.error and "step() of task 'train_0' failed" in dropped.error
    )
    assert all(t.stop_reason is StopReason.ENVIRONMENT_ERROR for t in result.failures)


def test_what_a_validator_of_the_environment_refuses(suite_of: Any) -> None:
    """OpenEnv's server cannot report a ValueError of a validator: docs/openenv.md says so."""
    seen, _ = play(suite_of("Guess", "in process", train_size=1), guess(13))
    assert shown(seen) == ["Error: guess: Value error, 13 is unlucky"]
    suite = suite_of("Guess", "by URL", train_size=1)
    environment: Any = suite.create(suite.tasks("train")[0])
    environment.observe()
    with pytest.raises(OpenEnvError, match=r"Unable to serialize .* \(SESSION_ERROR\)"):
        environment.step(guess(13))
    environment.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_step_has_a_time_limit(toys: Any, suite_of: Any, way: str) -> None:
    suite = suite_of("SlowGuess", way, train_size=1, timeout_seconds=0.2)
    environment: Any = suite.create(suite.tasks("train")[0])
    environment.observe()
    began = time.monotonic()
    with pytest.raises(OpenEnvError, match=r"step .*took longer than 0.2 seconds"):
        environment.step(guess(1))
    assert time.monotonic() - began < 1.2
    environment.close()
    until(lambda: not toys.Guess.open_now)  # once the step has come back


def test_an_environment_is_called_in_one_thread(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.Guess.threads.clear()
    rollout(OpenEnv("tests.openenv_toys:Guess", train_size=2), 2, 2, 2)
    threads = list(toys.Guess.threads.values())
    assert len(threads) == 8 and all(len(of_one) == 1 for of_one in threads)
    assert len(set.union(*threads)) > 1
    monkeypatch.setattr(toys.Guess, "REQUIRES_SINGLE_THREAD_EXECUTOR", True)
    toys.Guess.threads.clear()
    rollout(OpenEnv("tests.openenv_toys:Guess", train_size=2), 2, 2, 2)
    assert len(set.union(*toys.Guess.threads.values())) == 1


def test_options_make_the_environment() -> None:
    suite = OpenEnv("tests.openenv_toys:Guess", options={"tries": 1}, train_size=1)
    assert shown(play(suite, guess(2))[0]) == ["failed"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"environment": "no_such_module:X"},
            "'no_such_module:X' cannot be imported (ModuleNotFoundError: No module named",
        ),
        (
            {"environment": "tests.openenv_toys:Missing"},
            "cannot be imported (AttributeError: module 'tests.openenv_toys' has no",
        ),
        ({"environment": "tests.openenv_toys:MODELS"}, "is a dict, not an environment class"),
        (
            {"environment": "tests.openenv_toys:LetterAction"},
            "is not an OpenEnv environment: LetterAction",
        ),
        (
            {"environment": "tests.openenv_toys:Bare"},
            "it is not known; set `action` to its import path",
        ),
        (
            {"action": "tests.openenv_toys:Guess"},
            "'tests.openenv_toys:Guess' is no class of actions",
        ),
        ({"train": ({"level": 3},)}, "takes no 'level'; it takes seed, episode_id, low"),
        (
            {"text_field": "text"},
            "text_field is 'text', but the fields of the actions are guess, comment",
        ),
        ({"text_field": "guess"}, "text_field is 'guess', which is no text"),
    ],
)
def test_what_the_environment_contradicts_is_told_before_a_run(
    settings: dict[str, Any], told: str
) -> None:
    suite = OpenEnv(**{"environment": "tests.openenv_toys:Guess", "train_size": 1, **settings})
    with pytest.raises(OpenEnvError) as caught:
        suite.tasks("train")
    assert told in str(caught.value)


def test_the_class_of_actions_can_be_named() -> None:
    suite = OpenEnv(
        "tests.openenv_toys:Bare",
        action="tests.openenv_toys:LetterAction",
        text_field="text",
        train_size=1,
    )
    assert shown(play(suite, "abc")[0]) == ["finished"]


def test_a_wrong_url_is_told(toys: Any) -> None:
    with pytest.raises(
        OpenEnvError, match=r"no OpenEnv server answers at http://127.0.0.1:9/schema"
    ):
        OpenEnv("http://127.0.0.1:9", train_size=1).tasks("train")

    async def other(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>"})

    with (
        toys.serving(other) as (url, _),
        pytest.raises(OpenEnvError, match="is no OpenEnv server: it gave no JSON"),
    ):
        OpenEnv(url, train_size=1).tasks("train")
    with (
        toys.serving(toys.application(toys.Guess)) as (url, _),
        pytest.raises(OpenEnvError, match="/elsewhere/schema answered with status 404"),
    ):
        OpenEnv(f"{url}/elsewhere", train_size=1).tasks("train")


def test_a_task_of_another_suite_is_refused() -> None:
    with pytest.raises(TypeError, match="task 'x' does not belong to this suite"):
        OpenEnv("tests.openenv_toys:Guess").create(Task("x"))
