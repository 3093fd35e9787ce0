"""The judge of gibberish against a real HTTP service on loopback, well and badly behaved."""

import dataclasses
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxgrpo.config.settings import Config
from jaxgrpo.rewards import judge as judge_module
from jaxgrpo.rewards.base import RewardError, RewardSettings
from jaxgrpo.rewards.judge import PROMPT, GibberishJudge, JudgeError
from jaxgrpo.types import Message, Trajectory
from tests.episodes import episode
from tests.judge_service import (
    KEY,
    breaks_off,
    completion,
    hangs_up,
    in_turn,
    says,
    serving,
    slowly,
    status,
    trickles,
)
from tests.training import small_config


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge_module, "_FIRST_PAUSE", 0.01)


def played(*texts: str) -> Trajectory:
    opening = (Message("system", "the tools"), Message("user", "do it"))
    said = tuple(
        m for text in texts for m in (Message("assistant", text), Message("tool", "RESULT"))
    )
    return dataclasses.replace(
        episode([1], [2], [1], 0.75), messages=opening + said, turns=len(texts)
    )


def judge(service, **settings) -> GibberishJudge:
    return GibberishJudge(service.url, "a-judge", **{"deadline_seconds": 5.0, **settings})


def verdict(of: GibberishJudge, *texts: str) -> tuple[float, float | None]:
    trajectory = played(*texts)
    reward = of(trajectory, trajectory.score)
    return reward.parts["gibberish_judge"], reward.override


@pytest.mark.parametrize("word", ["yes", "Yes", " YES.\n"])
def test_gibberish_replaces_the_reward(word: str) -> None:
    with serving(says(word)) as service:
        score = RewardSettings((judge(service),)).score(played("xq zzv"))
    assert (score.reward, score.parts["gibberish_judge"], score.passed) == (-1.0, -1.0, True)
    assert score.notes["gibberish_judge"] == "a-judge found gibberish"


@pytest.mark.parametrize("word", ["no", "No."])
def test_what_is_no_gibberish_keeps_its_reward(word: str) -> None:
    with serving(says(word)) as service:
        score = RewardSettings((judge(service),)).score(played("I list the files."))
    assert (score.reward, score.parts["gibberish_judge"]) == (0.75, 0.0)


def test_the_request_is_a_chat_completion_about_the_policys_texts_alone() -> None:
    with serving(says("no")) as service:
        verdict(judge(service), "erste »Zeile«", "second\n\ud800")
    ((path, authorization, body),) = service.requests
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {
        "model": "a-judge",
        "messages": [
            {"role": "system", "content": PROMPT},
            {"role": "user", "content": '["erste »Zeile«", "second\\n?"]'},
        ],
        "temperature": 0,
        "max_tokens": 16,
    }


def test_a_service_without_key_gets_none() -> None:
    with serving(says("no")) as service:
        verdict(judge(service, key_variable=""), "a")
    assert service.requests[0][1] is None


def test_the_penalty_is_a_setting() -> None:
    with serving(says("yes")) as service:
        assert verdict(judge(service, penalty=-0.5), "a") == (-0.5, -0.5)


NONSENSE = {
    "maybe": completion("maybe"),
    "a sentence": completion("yes, it does"),
    "nothing": completion(""),
    "no text": completion(None),
    "a list": completion(["yes"]),
    "no JSON": "<html>gateway</html>",
    "cut off": '{"choices": [',
    "another object": '{"object": "error"}',
    "no choice": '{"choices": []}',
    "two choices": '{"choices": [{"message": {"content": "yes"}}, {"message": {"content": "no"}}]}',
    "deep": "[" * 100_000,
    "a number": "7",
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_nonsense_answer_is_no_verdict_and_not_asked_for_again(name: Any) -> None:
    nonsense = lambda handler, body: handler.answer(NONSENSE[name])
    said = r"must answer yes or no|is no chat completion"
    with serving(nonsense) as service, pytest.raises(JudgeError, match=said):
        verdict(judge(service), "a")
    assert len(service.requests) == 1


@pytest.mark.parametrize("trouble", [status(429), status(500), status(503), hangs_up, breaks_off])
def test_a_busy_or_broken_service_is_asked_again(trouble: Any) -> None:
    with serving(in_turn(trouble, trouble, says("yes"))) as service:
        assert verdict(judge(service), "a") == (-1.0, -1.0)
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (status(429, "slow down"), "the service answered 429: slow down, 3 times"),
        (hangs_up, "RemoteProtocolError: .*, 3 times"),
        (breaks_off, "RemoteProtocolError: .*, 3 times"),
    ],
)
def test_after_the_retries_there_is_no_verdict(trouble: Any, said: str) -> None:
    with serving(trouble) as service, pytest.raises(JudgeError, match=said):
        verdict(judge(service, retries=2), "a")
    assert len(service.requests) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 302])
def test_a_refusal_is_not_asked_for_again_and_the_key_is_not_shown(code: int) -> None:
    refuses = status(code, f"Incorrect API key provided: {KEY}")
    with serving(refuses) as service, pytest.raises(RewardError) as error:
        RewardSettings((judge(service),)).score(played("a"))
    assert f"the service answered {code}: Incorrect API key provided: ***" in str(error.value)
    assert KEY not in "".join(traceback.format_exception(error.value))
    assert len(service.requests) == 1


def test_a_status_line_with_the_key_is_not_shown_either() -> None:
    def echoes(handler, body):
        handler.wfile.write(f"HTTP/1.1 {KEY}\r\n\r\n".encode())
        handler.close_connection = True

    with serving(echoes) as service, pytest.raises(JudgeError) as error:
        verdict(judge(service, retries=0), "a")
    assert KEY not in "".join(traceback.format_exception(error.value))


def test_nobody_listens() -> None:
    with serving(says("no")) as service:
        url = service.url
    with pytest.raises(JudgeError, match=r"ConnectError: .*, 2 times"):
        verdict(GibberishJudge(url, "a-judge", deadline_seconds=5.0, retries=1), "a")


@pytest.mark.parametrize("script", [slowly(3, says("no")), trickles])
def test_a_late_answer_is_no_verdict(script: Any) -> None:
    start = time.monotonic()
    with (
        serving(script) as service,
        pytest.raises(JudgeError, match=r"no answer within 0\.3 seconds"),
    ):
        verdict(judge(service, deadline_seconds=0.3), "a")
    assert time.monotonic() - start < 2


def test_a_pause_that_the_service_asks_for_is_kept_or_ends_the_try() -> None:
    with serving(in_turn(status(429, "wait", Retry_After="0.3"), says("no"))) as service:
        start = time.monotonic()
        verdict(judge(service), "a")
        assert time.monotonic() - start >= 0.3
    with serving(status(429, "wait", Retry_After="60")) as service:
        start = time.monotonic()
        with pytest.raises(JudgeError, match="429: wait, and the time is over"):
            verdict(judge(service), "a")
        assert time.monotonic() - start < 2


def test_an_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "LONGEST_ANSWER", 1000)
    long = lambda handler, body: handler.answer(" " * 5000)
    with serving(long) as service, pytest.raises(JudgeError, match="more than 1000 bytes"):
        verdict(judge(service), "a")


def test_the_same_texts_are_asked_about_once() -> None:
    def script(handler, body):
        handler.answer(completion("yes" if "bad" in body["messages"][-1]["content"] else "no"))

    with serving(script) as service:
        one = judge(service)
        assert [verdict(one, text)[0] for text in ("bad", "good", "bad", "good")] == [-1, 0, -1, 0]
        assert service.texts == ['["bad"]', '["good"]']
        other = dataclasses.replace(one, model="another")
        verdict(other, "bad")
        verdict(one, "bad", "good")
        verdict(one, "bad good")
        assert service.texts[2:] == ['["bad"]', '["bad", "good"]', '["bad good"]']


def test_failures_are_not_remembered() -> None:
    with serving(in_turn(says("maybe"), says("no"))) as service:
        one = judge(service)
        with pytest.raises(JudgeError):
            verdict(one, "a")
        assert verdict(one, "a") == (0.0, None)


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "CACHED_ANSWERS", 2)
    with serving(says("no")) as service:
        one = judge(service)
        for text in ("a", "b", "a", "c", "a", "b"):  # b, the one unused longest, makes room for c
            verdict(one, text)
    assert service.texts == ['["a"]', '["b"]', '["c"]', '["b"]']


def test_the_calls_of_a_run_are_bounded_retries_included() -> None:
    with serving(in_turn(status(500), says("no"))) as service:
        one = judge(service, max_calls=3)
        verdict(one, "a")
        verdict(one, "b")
        with pytest.raises(JudgeError, match="the 3 calls of max_calls are used up"):
            verdict(one, "c")
        assert verdict(one, "a") == (0.0, None)  # known
    assert len(service.requests) == 3


def test_many_threads_ask_and_few_requests_are_under_way() -> None:
    with serving(slowly(0.05, says("no"))) as service, ThreadPoolExecutor(24) as threads:
        one = judge(service, max_in_flight=3)
        start = threading.Barrier(24)

        def ask(number):
            start.wait()
            return verdict(one, f"text {number}")

        assert list(threads.map(ask, range(24))) == [(0.0, None)] * 24
    assert len(service.requests) == 24
    assert service.most_in_flight == 3


def test_who_finds_no_place_in_time_has_no_verdict() -> None:
    with serving(says("no")) as service:
        one = judge(service, max_in_flight=1, deadline_seconds=0.2)
        one._service._places.acquire()
        with pytest.raises(JudgeError, match=r"no place for a call became free in 0\.2 seconds"):
            verdict(one, "a")
        one._service._places.release()
        assert verdict(one, "a") == (0.0, None)
    assert len(service.requests) == 1


def problems(**settings) -> list[str]:
    config: Config = small_config("m")
    whole = {"url": "https://host/v1", "model": "m", **settings}
    rewards = RewardSettings((GibberishJudge(**whole),))
    return rewards.problems(dataclasses.replace(config, rewards=rewards))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": ""}, "url is empty: give the address of the service, such as https://host/v1"),
        ({"url": "host:80/v1"}, "url must be like https://host/v1"),
        ({"url": "https://me:word@host/v1"}, "without a user's name or key"),
        ({"model": ""}, "model is empty: name one that the service has"),
        (
            {"deadline_seconds": 60.0},
            "deadline_seconds (60.0) must be below rollout.step_deadline_seconds (60.0)",
        ),
        ({"key_variable": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_what_is_missing_is_told_by_name(settings: dict, said: str) -> None:
    (problem,) = problems(**settings)
    assert problem.startswith("rewards.GibberishJudge: ") and said in problem


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "\x7f"])
def test_what_cannot_be_a_key_is_told_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    (problem,) = problems()
    assert "OPENAI_API_KEY holds no key" in problem and key not in problem
    with pytest.raises(JudgeError) as error:
        verdict(GibberishJudge("http://127.0.0.1:9/v1", "m"), "a")
    assert key not in "".join(traceback.format_exception(error.value))


def test_nothing_is_missing() -> None:
    assert problems() == []
    assert problems(key_variable="") == []


@pytest.mark.parametrize(
    "settings", [{"retries": -1}, {"max_calls": 0}, {"max_in_flight": 0}, {"deadline_seconds": 0}]
)
def test_numbers_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        GibberishJudge("https://host/v1", "m", **settings)
