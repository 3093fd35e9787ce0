"""Plays OpenEnv's toy environments in tests."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.envs.openenv import OpenEnv
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.rollout import Rollout
from jaxgrpo.types import Score
from tests.byte_chat import byte_tokenizer
from tests.rollout_fakes import Say, ScriptedSampler

WAYS = ("in process", "by URL")


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
