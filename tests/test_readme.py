"""The README tells the truth: its example environment works, its commands' files are there, and the map names every folder."""

import asyncio
import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import Limits
from jaxgrpo.rollout.rollout import Rollout
from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.types import StopReason
from tests.byte_chat import byte_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "map.md").read_text()


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> types.ModuleType:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    file = tmp_path_factory.mktemp("example") / "guess.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("guess", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["guess"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Bisecting:
    """A sampler that plays the example's game well: it halves what is left after each hint in the context."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    async def generate(self, request: SamplingRequest) -> Generation:
        low, high = 1, 20
        text = self.tokenizer.decode(request.context_ids[request.prompt_length :].tolist())
        for guess, hint in re.findall(r"<guess>(\d+)</guess>.*?(higher|lower)", text, re.DOTALL):
            low, high = (int(guess) + 1, high) if hint == "higher" else (low, int(guess) - 1)
        ids = np.asarray(
            self.tokenizer.encode(f"<guess>{(low + high) // 2}</guess>", add_special_tokens=False),
            np.int32,
        )
        return Generation(
            ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), FinishReason.STOP
        )

    async def release(self, episode_id: str) -> None: ...


def test_the_example_environment_is_played_to_its_end(example):
    tokenizer = byte_tokenizer()
    suite = example.GuessTheNumber()
    rollout = Rollout(Bisecting(tokenizer), suite, Chat(tokenizer), Limits(1024, 10, 1024, 4096))
    result = asyncio.run(rollout.groups(suite.tasks("train"), group_size=1, seed=0, batch="b"))
    assert len(suite.tasks("train")) == 15
    assert len(suite.tasks("test")) == 5
    rewards = {g.task.id: g.trajectories[0].score.reward for g in result.groups}
    assert rewards["number_10"] == 1.0  # the first guess of 1 to 20
    assert rewards["number_5"] == pytest.approx(0.8)  # the second
    assert all(g.trajectories[0].stop_reason is StopReason.FINISHED for g in result.groups)


def test_the_example_environment_answers_nonsense_and_ends(example):
    game = example.GuessTheNumber(guesses=2).create(example.GuessTheNumber().tasks("train")[0])
    assert (
        game.step("no idea").observation.messages[0].content
        == "Write a number inside <guess></guess>."
    )
    assert game.step("<guess>7</guess>").stop_reason is StopReason.FAILED
    assert game.score().reward == 0.0


def test_the_map_names_every_folder():
    parts = ("jaxgrpo", "envs", "configs", "tools", "benchmarks")
    folders = {
        str(p.parent.relative_to(ROOT)) for part in parts for p in (ROOT / part).rglob("*.py")
    }
    assert len(folders) > 15
    assert set(re.findall(r"^\| `([\w/]+)/` \|", MAP, re.M)) == folders


def test_every_file_that_the_readme_names_exists():
    named = set(
        re.findall(r"`?((?:configs|docs|tools|benchmarks|envs)/[\w./]+\.(?:py|md))`?", README)
    )
    assert len(named) > 4
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
