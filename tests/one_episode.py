"""One episode in environments of a test's own."""

import asyncio

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import EpisodeKey, EpisodeRunner, Limits, SamplingParams
from jaxgrpo.run import records
from jaxgrpo.run.records import TrajectoryRecord
from jaxgrpo.types import Task
from tests.byte_chat import byte_tokenizer
from tests.rollout_fakes import EchoEnvironment, Say, ScriptedSampler, Suite

TASK = Task("echo_1")
KEY = EpisodeKey(7, "step-1", "echo_1", 2)


def limits(completion: int, turns: int, prompt: int, context: int) -> Limits:
    """Limits in tokens, and in the policy's turns."""
    settings = RolloutSettings(
        max_prompt_tokens=prompt, max_completion_tokens=completion, max_turns=turns
    )
    return Limits(settings, context)


LIMITS = limits(400, 10, 200, 1000)


def play(make, *, limits=LIMITS, deadline=10.0, rewards=RewardSettings(), chat=None):  # noqa: B008
    """One episode in environments of `make`: "x", then "done". The opening is an ordinary one's."""
    sampler, chat = ScriptedSampler([Say("x"), Say("done")]), chat or Chat(byte_tokenizer())

    async def run():
        suite = Suite(lambda task, earlier: make() if earlier else EchoEnvironment())
        calls = BlockingCalls(2, deadline, say=lambda line: None)
        runner = EpisodeRunner(sampler, suite, chat, limits, SamplingParams(), calls, rewards)
        return await runner.run(TASK, await runner.open(TASK), KEY)

    trajectory = asyncio.run(run())
    assert (
        records.from_line(
            records.to_line(TrajectoryRecord(trajectory, "train", 1))
        ).trajectory.error
        == trajectory.error
    )
    return trajectory


def stepping(step):
    """A suite's `make` for environments that step so."""

    class Stepping(EchoEnvironment):
        def step(self, action):
            return step(super().step, action)

    return Stepping
