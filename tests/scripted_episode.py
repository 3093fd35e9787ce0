"""One episode of a scripted sampler in an ordinary environment."""

import asyncio

from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import EpisodeKey, EpisodeRunner, Limits, SamplingParams
from jaxgrpo.types import Task, Trajectory
from tests.byte_chat import AB, END, START, byte_tokenizer
from tests.one_episode import limits as limits_of
from tests.rollout_fakes import (
    EchoEnvironment,
    ScriptedSampler,
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
