"""One episode: the golden trajectory, each stop reason, and the borders of the limits."""

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxgrpo.environment import StepResult
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import EpisodeRunner, SamplingParams
from jaxgrpo.rollout.openings import PromptError
from jaxgrpo.samplers.base import FinishReason
from jaxgrpo.types import Message, Score, StopReason, ToolCall, Trajectory
from tests.byte_chat import END, byte_tokenizer
from tests.one_episode import limits as limits_of
from tests.rollout_fakes import (
    EchoEnvironment,
    Say,
    ScriptedSampler,
    Suite,
)
from tests.scripted_episode import AFTER_EOS, KEY, PROMPT, TASK, play


def test_golden_trajectory() -> None:
    script = [
        Say("ab", version=3),
        Say("x</t>", FinishReason.STOP, version=3),
        Say("done", version=4),
    ]
    trajectory = play(script)
    assert trajectory.prompt_ids_P.tolist() == PROMPT
    # fmt: off
    assert trajectory.completion_ids_C.tolist() == [
        97, 98, 259,  # "ab" as the policy spelled it, in two tokens; the environment's is one, 256
        10, 258, 117, 115, 101, 114, 10, 60, 114, 62, 256, 60, 47, 114, 62, 259,
        10, 258, 97, 115, 115, 105, 115, 116, 97, 110, 116, 10,
        120, 60, 47, 116, 62,  # "x</t>", ended by the stop string: the template closes the turn
        259, 10, 258, 117, 115, 101, 114, 10, 60, 114, 62, 256, 60, 47, 114, 62, 259,
        10, 258, 97, 115, 115, 105, 115, 116, 97, 110, 116, 10,
        100, 111, 110, 101, 259,  # "done"
    ]
    assert trajectory.action_mask_C.astype(int).tolist() == [
        1, 1, 1,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        1, 1, 1, 1, 1,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        1, 1, 1, 1, 1,
    ]
    assert trajectory.sampler_logprobs_C.tolist() == [
        -.125, -.25, -.375,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        -.125, -.25, -.375, -.5, -.625,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        -.125, -.25, -.375, -.5, -.625,
    ]
    assert trajectory.weight_versions_C.tolist() == [
        3, 3, 3,
        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
        -1, -1, -1, -1, -1, -1, -1, -1,
        3, 3, 3, 3, 3,
        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
        -1, -1, -1, -1, -1, -1, -1, -1, -1,
        4, 4, 4, 4, 4,
    ]
    # fmt: on
    assert [
        array.dtype
        for array in (
            trajectory.completion_ids_C,
            trajectory.action_mask_C,
            trajectory.sampler_logprobs_C,
        )
    ] == [
        np.int32,
        np.bool_,
        np.float32,
    ]
    assert trajectory.messages == (
        Message("user", "q"),
        Message("assistant", "ab"),
        Message("tool", "ab"),
        Message("assistant", "x</t>"),
        Message("tool", "ab"),
        Message("assistant", "done"),
    )
    assert trajectory.calls == (
        ToolCall("echo", '"ab"', "ab", ok=True),
        ToolCall("echo", '"x</t>"', "ab", ok=True),
    )
    assert trajectory.score == Score(2.0, True, {"calls": 2.0})
    assert (trajectory.turns, trajectory.stop_reason, trajectory.error) == (
        3,
        StopReason.FINISHED,
        "",
    )
    assert (trajectory.task_id, trajectory.sample_index) == ("echo_1", 2)


def test_requests_hold_the_whole_episode_and_what_is_left_of_its_budget() -> None:
    sampler = ScriptedSampler([Say("ab"), Say("done")])
    play(None, limits=limits_of(100, 10, 50, 1000), sampler=sampler)
    first, second = sampler.requests
    assert first.context_ids.tolist() == PROMPT
    assert second.context_ids.tolist() == [*PROMPT, 97, 98, END, *AFTER_EOS]
    assert (first.max_tokens, second.max_tokens) == (100, 100 - 3 - 28)
    assert (first.prompt_length, second.prompt_length) == (35, 35)
    assert {r.group_id for r in sampler.requests} == {"step-1/echo_1"}
    assert {r.episode_id for r in sampler.requests} == {"step-1/echo_1/2/0"}
    assert first.stop_strings == ("</t>",)
    assert first.seed == KEY.seed(0) != second.seed == KEY.seed(1)
    assert sampler.released == ["step-1/echo_1/2/0"]


def test_requests_say_how_tokens_are_drawn_and_what_ends_this_turn() -> None:
    class TwoMarks(EchoEnvironment):
        def step(self, action):
            result = super().step(action)
            later = result.observation and dataclasses.replace(
                result.observation, stop_strings=("</second>",)
            )
            return dataclasses.replace(result, observation=later)

    sampler = ScriptedSampler([Say("ab"), Say("done")])
    play(
        None,
        environment=TwoMarks,
        sampler=sampler,
        sampling=SamplingParams(temperature=0.7, top_p=0.9),
    )
    assert [(r.temperature, r.top_p) for r in sampler.requests] == [(0.7, 0.9)] * 2
    assert [r.stop_strings for r in sampler.requests] == [("</t>",), ("</second>",)]


def test_each_token_carries_the_version_that_made_it() -> None:
    class Published(ScriptedSampler):
        async def generate(self, request):
            generation = await super().generate(request)
            versions = np.arange(5, 5 + len(generation.token_ids_T))
            return dataclasses.replace(generation, weight_versions_T=versions)

    trajectory = play(None, sampler=Published([Say("ab"), Say("done")]))
    assert trajectory.weight_versions_C.tolist() == [5, 6, 7, *[-1] * 28, 5, 6, 7, 8, 9]


def test_the_call_that_ends_an_episode_is_recorded() -> None:
    last = ToolCall("submit", "{}", "thank you", ok=True)
    end = StepResult(stop_reason=StopReason.FINISHED, calls=(last,))

    class Ending(EchoEnvironment):
        def step(self, action: str) -> StepResult:
            return end

    assert play([Say("x")], environment=Ending).calls == (last,)


def tokens_after_the_answer(trajectory: Trajectory, score: Score) -> float:
    """How many tokens follow "ab", its end and the environment's answer."""
    assert (trajectory.stop_reason, score) == (
        StopReason.FINISHED,
        Score(1.0, True, {"calls": 1.0}),
    )
    return float(len(trajectory.completion_ids_C) - 3 - 28)


def test_reward_functions_judge_what_was_played() -> None:
    rewards = RewardSettings(
        (tokens_after_the_answer,), {"environment": 0.5, "tokens_after_the_answer": 2.0}
    )
    score = play([Say("ab"), Say("done")], rewards=rewards).score
    assert score.reward == 0.5 * 1 + 2 * 5
    assert score.parts == {"calls": 1.0, "environment": 1.0, "tokens_after_the_answer": 5.0}


@pytest.mark.parametrize(("allowed", "fits"), [(35, True), (34, False)])
def test_a_prompt_may_be_as_long_as_the_limit(allowed: int, fits: bool) -> None:
    limits = limits_of(100, 10, allowed, 1000)
    runner = EpisodeRunner(
        ScriptedSampler([]),
        Suite(),
        Chat(byte_tokenizer()),
        limits,
        SamplingParams(),
        BlockingCalls(4, 10),
    )
    if fits:
        opening = asyncio.run(runner.open(TASK))
        assert opening.prompt_ids_P.tolist() == PROMPT
        assert not opening.prompt_ids_P.flags.writeable  # all episodes of the task hold this array
    else:
        with pytest.raises(
            PromptError, match=r"has 35 tokens, and rollout\.max_prompt_tokens is 34"
        ):
            asyncio.run(runner.open(TASK))


@pytest.mark.parametrize(
    ("word", "reason", "passed"),
    [
        ("done", StopReason.FINISHED, True),
        ("cannot", StopReason.GAVE_UP, False),
        ("broken", StopReason.FAILED, False),
    ],
)
def test_the_environment_ends_the_episode(word: str, reason: StopReason, passed: bool) -> None:
    trajectory = play([Say(word)])
    assert trajectory.stop_reason is reason
    assert trajectory.score.passed is passed
    assert not trajectory.overlong


def test_an_unfinished_turn_is_kept_but_not_executed() -> None:
    trajectory = play([Say("done, almost")], limits=limits_of(4, 10, 50, 1000))
    assert trajectory.stop_reason is StopReason.TOKEN_LIMIT
    assert trajectory.completion_ids_C.tolist() == [*b"done"]
    assert trajectory.messages[-1] == Message("assistant", "done")
    assert trajectory.score == Score(0.0, False, {"calls": 0.0})
    assert trajectory.overlong


def test_the_context_binds_before_the_budget() -> None:
    trajectory = play([Say("done, almost")], limits=limits_of(100, 10, 35, 39))
    assert trajectory.stop_reason is StopReason.CONTEXT_LIMIT
    assert trajectory.completion_ids_C.tolist() == [*b"done"]


def test_a_sampler_whose_own_context_is_shorter_ends_the_episode_by_context() -> None:
    class Short(ScriptedSampler):
        async def generate(self, request):
            return await super().generate(dataclasses.replace(request, max_tokens=2))

    assert play(None, sampler=Short([Say("done")])).stop_reason is StopReason.CONTEXT_LIMIT


@pytest.mark.parametrize(
    ("budget", "context", "reason", "tokens"),
    [
        (
            3 + 28,
            1000,
            StopReason.TOKEN_LIMIT,
            3,
        ),  # the answer fits, but not one sampled token after it: it is left out
        (3 + 28 + 1, 1000, StopReason.TOKEN_LIMIT, 3 + 28 + 1),  # exactly one more token
        (1000, 35 + 3 + 28, StopReason.CONTEXT_LIMIT, 3),
        (1000, 35 + 3 + 28 + 1, StopReason.CONTEXT_LIMIT, 3 + 28 + 1),
    ],
)
def test_an_observation_needs_room_for_one_sampled_token(
    budget: Any, context: Any, reason: StopReason, tokens: Any
) -> None:
    trajectory = play([Say("ab"), Say("done")], limits=limits_of(budget, 10, 35, context))
    assert trajectory.stop_reason is reason
    assert len(trajectory.completion_ids_C) == tokens
    assert trajectory.action_mask_C[-1]
    assert len(trajectory.calls) == 1  # the call itself was made


def test_the_budget_may_end_exactly_with_the_last_turn() -> None:
    trajectory = play([Say("done")], limits=limits_of(5, 10, 50, 1000))
    assert trajectory.stop_reason is StopReason.FINISHED


def test_the_last_turns_call_is_made_before_the_step_limit_is_declared() -> None:
    trajectory = play([Say("a"), Say("b"), Say("c")], limits=limits_of(1000, 2, 50, 2000))
    assert trajectory.stop_reason is StopReason.STEP_LIMIT
    assert [call.arguments for call in trajectory.calls] == ['"a"', '"b"']
    assert trajectory.turns == 2
    assert trajectory.completion_ids_C.tolist() == [97, END, *AFTER_EOS, 98, END]
    assert trajectory.score.reward == 2.0


def test_finishing_in_the_last_turn_is_finished() -> None:
    assert (
        play([Say("a"), Say("done")], limits=limits_of(1000, 2, 50, 2000)).stop_reason
        is StopReason.FINISHED
    )


def test_seeds_differ_in_everything_that_names_a_turn_and_are_fixed() -> None:
    keys = [
        KEY,
        dataclasses.replace(KEY, run_seed=8),
        dataclasses.replace(KEY, batch="step-2"),
        dataclasses.replace(KEY, task_id="echo_2"),
        dataclasses.replace(KEY, sample_index=3),
        dataclasses.replace(KEY, attempt=1),
    ]
    seeds = {key.seed(turn) for key in keys for turn in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert (
        KEY.seed(0) == 1388743270
    )  # a run must be repeatable in another process, on another machine


def test_room_names_the_limit_that_binds() -> None:
    limits = limits_of(8, 10, 5, 12)
    assert limits.room(5, 4) == (3, StopReason.CONTEXT_LIMIT)
    assert limits.room(4, 4) == (4, StopReason.TOKEN_LIMIT)
    assert limits.room(2, 0) == (8, StopReason.TOKEN_LIMIT)


def test_limits_refuse_a_prompt_that_fills_the_context() -> None:
    message = r"max_prompt_tokens \(8192\) must be below context_length \(8192\)"
    with pytest.raises(ValueError, match=message):
        limits_of(2048, 10, 8192, 8192)


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_decoding_refuses_nonsense(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match=rf"got {temperature} and {top_p}"):
        SamplingParams(temperature, top_p)
