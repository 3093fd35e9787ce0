"""Sessions of OpenEnv environments that are too many, are lost, fail or hang, and wrong settings.

python -m pytest -m openenv tests/envs/test_openenv_faults.py
"""

import threading
import time
from typing import Any

import pytest

from jaxgrpo.envs.openenv import OpenEnv
from jaxgrpo.envs.openenv.sessions import OpenEnvError
from jaxgrpo.types import StopReason, Task
from tests.openenv_play import WAYS, guess, play, rollout, shown, until

pytestmark = pytest.mark.openenv


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
