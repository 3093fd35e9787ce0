"""One episode: the golden trajectory, each stop reason, the limits' borders, and what is refused."""

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import EpisodeKey, EpisodeRunner, Limits, SamplingParams
from jaxgrpo.rollout.openings import PromptError
from jaxgrpo.samplers.base import FinishReason, Generation, SamplerError
from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall, Trajectory
from tests.byte_chat import AB, END, START, byte_tokenizer
from tests.one_episode import limits as limits_of
from tests.rollout_fakes import (
    OPENING,
    EchoEnvironment,
    FailingEnvironment,
    Say,
    ScriptedSampler,
    SlowEnvironment,
    Suite,
)

TASK = Task("echo_1")
ROOMY, PLAIN = limits_of(2048, 10, 6144, 8192), SamplingParams()
KEY = EpisodeKey(7, "step-1", "echo_1", 2)
PROMPT = [START, *b"system\nHelp.", END, 10, START, *b"user\nq", END, 10, START, *b"assistant\n"]
AFTER_EOS = [10, START, *b"user\n<r>", AB, *b"</r>", END, 10, START, *b"assistant\n"]  # 28 tokens
AFTER_STOP = [END, *AFTER_EOS]


def play(
    script,
    environment=EchoEnvironment,
    limits: Limits = ROOMY,
    deadline: float = 10.0,
    sampler=None,
    sampling=PLAIN,
    **options,
) -> Trajectory:
    sampler = sampler or ScriptedSampler(script)

    async def run() -> Trajectory:
        suite = Suite(lambda task, earlier: environment())
        runner = EpisodeRunner(
            sampler,
            suite,
            Chat(byte_tokenizer()),
            limits,
            sampling,
            BlockingCalls(4, deadline),
            **options,
        )
        opening = await EpisodeRunner(
            sampler, Suite(), runner.chat, limits, SamplingParams(), BlockingCalls(4, 10)
        ).open(TASK)
        return await runner.run(TASK, opening, KEY)

    return asyncio.run(run())


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
        97, 98, 259,  # "ab" as the policy spelled it, in two tokens; the environment's "ab" is one, 256
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
        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
        3, 3, 3, 3, 3,
        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
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
