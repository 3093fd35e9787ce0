"""One episode: environments that fail or break their contract, and samplers that do."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.samplers.base import FinishReason, Generation, SamplerError
from jaxgrpo.types import Message, Score, StopReason
from tests.byte_chat import END
from tests.one_episode import limits as limits_of
from tests.rollout_fakes import (
    OPENING,
    EchoEnvironment,
    FailingEnvironment,
    Say,
    ScriptedSampler,
    SlowEnvironment,
)
from tests.scripted_episode import play


@pytest.mark.parametrize("where", ["observe", "step", "score"])
def test_an_environment_that_raises_has_no_score(where: str) -> None:
    sampler = ScriptedSampler([Say("done")])
    trajectory = play(None, environment=lambda: FailingEnvironment(where), sampler=sampler)
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert trajectory.score is None
    assert "KeyError: 'no such seat'" in trajectory.error
    assert "in _fail" in trajectory.error  # the traceback reaches into the environment
    assert trajectory.completion_ids_C.tolist() == ([] if where == "observe" else [*b"done", END])
    assert sampler.released == ["step-1/echo_1/2/0"]


def test_an_environment_that_cannot_be_made_has_no_score() -> None:
    def refuse():
        raise OSError("no disk")

    trajectory = play([Say("done")], environment=refuse)
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert "OSError: no disk" in trajectory.error


def test_a_step_past_its_deadline_is_an_environment_error() -> None:
    trajectory = play([Say("done")], environment=SlowEnvironment, deadline=0.05)
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert "took longer than the deadline of 0.05 seconds" in trajectory.error


def environment_with(**methods):
    """An echo whose methods of these names are given."""
    environment = EchoEnvironment()
    for name, method in methods.items():
        setattr(environment, name, method)
    return environment


FINITE = "must be a finite number"


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("step", lambda: None, "step() of task 'echo_1' returned NoneType, not StepResult ("),
        ("score", lambda: 1.0, "score() of task 'echo_1' returned float, not Score ("),
        (
            "score",
            lambda: Score(float("nan"), False),
            f"ValueError: a score's reward {FINITE} from -1e+12 to 1e+12, got nan (",
        ),
        (
            "score",
            lambda: Score(1.0, True, {"state": float("inf")}),
            f"ValueError: a score's parts['state'] {FINITE} from",
        ),
        ("score", lambda: Score(None, False), f"TypeError: a score's reward {FINITE}, got None"),
        (
            "score",
            lambda: Score(1.0, 1.0),
            "TypeError: a score's passed must be True or False, got 1.0",
        ),
        (
            "step",
            lambda: StepResult(stop_reason=StopReason.ENVIRONMENT_ERROR),
            "stopped the episode with ENVIRONMENT_ERROR",
        ),
        (
            "step",
            lambda: StepResult(Observation((Message("tool", None),))),
            "TypeError: a message's content must be a str, got None",
        ),
        (
            "step",
            lambda: StepResult(Observation(("ab",))),
            "TypeError: a message must be of type Message, got 'ab'",
        ),
        (
            "step",
            lambda: StepResult(Message("tool", "ab")),
            "TypeError: a step's observation must be of type Observation, got Message(",
        ),
        (
            "step",
            lambda: StepResult(stop_reason="finished"),
            "TypeError: a step's stop_reason must be of type StopReason, got 'finished'",
        ),
        (
            "step",
            lambda: StepResult(dataclasses.replace(OPENING, tools=({"name": "add"},))),
            "gave tools: only the first observation",
        ),
        (
            "step",
            lambda: StepResult(Observation((Message("assistant", "I agree"),))),
            "spoke as assistant: that is the policy's role",
        ),
    ],
)
def test_an_environment_that_breaks_its_contract(method: str, answer: Any, message: str) -> None:
    trajectory = play(
        [Say("done")], environment=lambda: environment_with(**{method: lambda *_: answer()})
    )
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert message in trajectory.error.splitlines()[0]
    if message.endswith("Error") or "Error: " in message:
        assert f"{__file__}, line " in trajectory.error.splitlines()[0]


def test_an_episode_that_opens_otherwise_than_its_task_is_an_environment_error() -> None:
    other = Observation((Message("user", "q at 12:01"),), stop_strings=("</t>",))
    trajectory = play([Say("done")], environment=lambda: environment_with(observe=lambda: other))
    assert trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert trajectory.error == (
        "task 'echo_1' opens differently from one episode to the next, which then share no prompt: "
        "in message 0 user says 'q' and then user says 'q at 12:01'"
    )


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([], [], "gave 0 tokens"),
        ([1] * 5, [0.0] * 5, "gave 5 tokens .* asked for 1 to 4"),
        ([1], [np.nan], "not finite"),
    ],
)
def test_generations_that_would_poison_a_batch_are_refused(
    ids: Any, logprobs: Any, message: str
) -> None:
    class Bad(ScriptedSampler):
        async def generate(self, request):
            return Generation(
                np.array(ids, int), np.array(logprobs), np.zeros(len(ids), int), FinishReason.STOP
            )

    sampler = Bad([])
    with pytest.raises(SamplerError, match=message):
        play(None, limits=limits_of(4, 10, 50, 1000), sampler=sampler)
    assert sampler.released == ["step-1/echo_1/2/0"]
