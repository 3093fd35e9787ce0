"""Users' code at its worst ends one episode, in the user's own words.

That holds for whatever an environment raises, returns or does to the process.
"""

import asyncio
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.types import Message, Score, StopReason, Task
from tests.one_episode import play, stepping
from tests.rollout_fakes import EchoEnvironment


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Exiting(Exception):
    def __str__(self):
        sys.exit(3)


class LongWinded(Exception):
    def __str__(self):
        return "very\nlong " * 1_000_000


def raising(error):
    def step(answer, action):
        raise error

    return step


LINE_OF_RAISE = raising.__code__.co_firstlineno + 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("no such seat"), "KeyError: 'no such seat'"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (asyncio.CancelledError(), "CancelledError"),
        (StopIteration("x"), "StopIteration: x"),
        (StopAsyncIteration(), "StopAsyncIteration"),
        (TimeoutError("the database is slow"), "TimeoutError: the database is slow"),
        (RecursionError("deep"), "RecursionError: deep"),
        (MemoryError(), "MemoryError"),
        (Mute(), "Mute: (its text cannot be had)"),
        (Exiting(), "Exiting: (its text cannot be had)"),
        (
            ExceptionGroup("both", [KeyError("a"), Mute()]),
            "ExceptionGroup: both (2 sub-exceptions)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_raised_is_shown_with_the_users_own_line_first(error: Any, said: str) -> None:
    trajectory = play(stepping(raising(error)))
    assert (trajectory.stop_reason, trajectory.score, trajectory.turns) == (
        StopReason.ENVIRONMENT_ERROR,
        None,
        1,
    )
    line, _, trace = trajectory.error.partition("\n")
    assert (
        line
        == f"{said} ({__file__}, line {LINE_OF_RAISE}, in step): step() of task 'echo_1' failed"
    )
    assert "Traceback (most recent call last)" in trace


def test_what_is_raised_is_told_in_a_bounded_line() -> None:
    line, _, trace = play(stepping(raising(LongWinded()))).error.partition("\n")
    assert line.startswith("LongWinded: very long very long") and len(line) < 900
    assert len(trace) <= 20_001


def test_an_error_in_a_library_is_shown_at_the_line_that_called_it() -> None:
    def step(answer, action):
        return np.linalg.inv(np.zeros((2, 2)))

    line = play(stepping(step)).error.splitlines()[0]
    assert line.startswith(
        f"LinAlgError: Singular matrix ({__file__}, line "
        f"{step.__code__.co_firstlineno + 1}, in step)"
    )


def test_an_error_of_an_environment_of_jaxgrpo_is_shown_at_its_own_line() -> None:
    def step(answer, action):
        return Warehouse().create(Task("lost", payload=None)).observe()

    line = play(stepping(step)).error.splitlines()[0]
    assert "/envs/procedural.py, line " in line and __file__ not in line


def test_a_record_that_is_refused_is_shown_at_the_line_that_made_it() -> None:
    def step(answer, action):
        return StepResult(Observation((Message("usr", "hi"),)))

    line = play(stepping(step)).error.splitlines()[0]
    assert line.startswith("ValueError: a message's role must be one of")
    assert f"({__file__}, line {step.__code__.co_firstlineno + 1}, in step)" in line


def test_an_error_of_a_reward_function_is_shown_at_its_own_line() -> None:
    line = play(EchoEnvironment, rewards=RewardSettings((failing,))).error.splitlines()[0]
    place = f"({__file__}, line {failing.__code__.co_firstlineno + 1}, in failing)"
    assert line == (
        f"RewardError: tests.rollout.test_user_code.failing raised ZeroDivisionError: "
        f"division by zero {place}: "
    ) + ("the rewards of task 'echo_1' failed")


def failing(trajectory, score):
    return 1 / 0


def test_a_weighted_sum_that_is_too_large_is_an_environment_error() -> None:
    trajectory = play(EchoEnvironment, rewards=RewardSettings((), {"environment": 1e13}))
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert trajectory.error.startswith(
        "ValueError: a score's reward must be a finite number from -1e+12 to 1e+12"
    )


class Careless(Score):
    """Its checks are left out."""

    def __post_init__(self):
        pass


class Lying:
    @property
    def __class__(self):
        raise RuntimeError("what am I?")


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (Careless(float("nan"), True), "ValueError: a score's reward must be a finite number"),
        (
            Careless(1.0, True, {"reward": float("inf")}),
            "ValueError: a score's parts['reward'] must be a finite number",
        ),
        (Careless(1.0, True, None), "TypeError: a score's parts must be a dict, got None"),
        (
            Careless(1.0, True, {}, {"why": np.nan}),
            "TypeError: a score's notes['why'] must be a str, got nan",
        ),
    ],
)
def test_a_score_of_a_derived_class_is_checked_all_the_same(score: Any, said: str) -> None:
    class Scoring(EchoEnvironment):
        def score(self):
            return score

    trajectory = play(Scoring)
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert trajectory.error.startswith(said)


def test_a_sound_score_of_a_derived_class_is_taken() -> None:
    class Scoring(EchoEnvironment):
        def score(self):
            return Careless(np.float32(0.5), np.bool_(True), {"reward": 1}, {"why": "so"})

    assert play(Scoring).score == Score(0.5, True, {"reward": 1.0}, {"why": "so"})


@pytest.mark.parametrize("answer", [lambda: None, str, dict, lambda: StepResult, Lying])
def test_answers_that_are_none(answer: Any) -> None:
    trajectory = play(stepping(lambda *_: answer()))
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR


class TestMethods:
    """A suite must create something that observes, steps and scores."""

    def error(self, made) -> str:
        return play(lambda: made).error

    def test_missing(self) -> None:
        class Scoreless:
            observe = EchoEnvironment.observe
            step = EchoEnvironment.step

        assert (
            "returned TestMethods.test_missing.<locals>.Scoreless, which has no method score() ("
            in self.error(Scoreless())
        )
        assert "returned NoneType, which has no method observe()" in self.error(None)

    def test_asynchronous(self) -> None:
        class Asynchronous(EchoEnvironment):
            async def step(self, action):
                return StepResult(stop_reason=StopReason.FINISHED)

        assert "Asynchronous, whose step is async: write it without" in self.error(Asynchronous())

    def test_of_other_arguments(self) -> None:
        class Stepless(EchoEnvironment):
            def step(self):
                return StepResult(stop_reason=StopReason.FINISHED)

        assert (
            "Stepless, which cannot be asked to step(action): too many positional arguments"
            in self.error(Stepless())
        )
        assert "EchoEnvironment, which cannot be asked to observe()" not in self.error(
            EchoEnvironment()
        )
        assert "cannot be asked to observe(): missing a required argument: 'self'" in self.error(
            EchoEnvironment
        )


class TestProcess:
    """What a step does to the process: the episode goes on as if it had not."""

    def finishes(self, step) -> bool:
        return play(stepping(step)).stop_reason is StopReason.FINISHED

    def test_a_loop_of_its_own(self) -> None:
        def step(answer, action):
            return asyncio.run(asyncio.sleep(0.01, answer(action)))

        assert self.finishes(step)

    def test_threads_of_its_own(self) -> None:
        def step(answer, action):
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
            return answer(action)

        assert self.finishes(step)

    def test_warnings_as_errors(self) -> None:
        def step(answer, action):
            np.seterr(all="raise")
            warnings.simplefilter("error")
            return answer(action)

        with warnings.catch_warnings():
            assert self.finishes(step)
        assert np.geterr()["divide"] == "warn"

    def test_numpys_complaints_are_its_own(self) -> None:
        def step(answer, action):
            np.seterr(all="raise")
            return answer(str(np.float64(1) / np.float64(0)))

        assert play(stepping(step)).error.startswith("FloatingPointError: divide by zero")

    def test_another_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "below").mkdir()

        def step(answer, action):
            os.chdir(tmp_path / "below")
            return answer(action)

        assert self.finishes(step)

    def test_a_signal_handler_is_refused_by_python(self) -> None:
        def step(answer, action):
            import signal

            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        assert play(stepping(step)).error.startswith("ValueError: signal only works in main thread")


class TestDeadline:
    def test_a_call_that_hangs_is_told_with_the_place_where_it_waits(self) -> None:
        gate = threading.Event()

        def step(answer, action):
            gate.wait(20)
            return answer(action)

        trajectory = play(stepping(step), deadline=0.1)
        gate.set()
        place = f"{__file__}, line {step.__code__.co_firstlineno + 1}, in step"
        assert trajectory.error == (
            f"step() of task 'echo_1' took longer than the deadline of 0.1 seconds: it "
            f"waits at {place}"
        )

    def test_it_holds_for_what_an_error_does_when_it_is_printed(self) -> None:
        class Slow(Exception):
            def __str__(self):
                time.sleep(20)
                return ""

        started = time.perf_counter()
        trajectory = play(stepping(raising(Slow())), deadline=0.2)
        assert "took longer than the deadline of 0.2 seconds" in trajectory.error
        assert time.perf_counter() - started < 5

    def test_it_holds_for_a_mapping_that_is_read(self) -> None:
        class Endless(Mapping):
            def __getitem__(self, name):
                return 1.0

            def __iter__(self):
                time.sleep(20)
                return iter("a")

            def __len__(self):
                return 1

        class Scoring(EchoEnvironment):
            def score(self):
                return Careless(1.0, True, Endless())

        started = time.perf_counter()
        assert (
            "score() of task 'echo_1' took longer than the deadline of 0.2 seconds"
            in play(Scoring, deadline=0.2).error
        )
        assert time.perf_counter() - started < 5
