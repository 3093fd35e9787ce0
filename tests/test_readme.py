"""Check the README and the map: the example works, named files exist, all folders are named."""

import asyncio
import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.rollout import Rollout
from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.types import StopReason
from tests.byte_chat import byte_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "map.md").read_text()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    file = tmp_path_factory.mktemp("example") / "guess.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("guess", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["guess"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Bisecting:
    """A sampler that plays the example's game by bisection, from the hints in the context."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
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


def test_the_example_environment_is_played_to_its_end(example: types.ModuleType) -> None:
    tokenizer = byte_tokenizer()
    suite = example.GuessTheNumber()
    settings = RolloutSettings(max_prompt_tokens=1024, max_completion_tokens=1024)
    rollout = Rollout(Bisecting(tokenizer), suite, Chat(tokenizer), 4096, settings)
    result = asyncio.run(rollout.groups(suite.tasks("train"), group_size=1, seed=0, batch="b"))
    assert len(suite.tasks("train")) == 15
    assert len(suite.tasks("test")) == 5
    rewards = {g.task.id: g.trajectories[0].score.reward for g in result.groups}
    assert rewards["number_10"] == 1.0  # the first guess of 1 to 20
    assert rewards["number_5"] == pytest.approx(0.8)  # the second
    assert all(g.trajectories[0].stop_reason is StopReason.FINISHED for g in result.groups)


def test_the_example_environment_answers_nonsense_and_ends(example: types.ModuleType) -> None:
    game = example.GuessTheNumber(guesses=2).create(example.GuessTheNumber().tasks("train")[0])
    assert (
        game.step("no idea").observation.messages[0].content
        == "Write a number inside <guess></guess>."
    )
    assert game.step("<guess>7</guess>").stop_reason is StopReason.FAILED
    assert game.score().reward == 0.0


def test_the_map_names_every_folder() -> None:
    parts = ("jaxgrpo", "envs", "configs", "tools", "benchmarks")
    folders = {
        str(p.parent.relative_to(ROOT)) for part in parts for p in (ROOT / part).rglob("*.py")
    }
    assert len(folders) > 15
    assert set(re.findall(r"^\| `([\w/]+)/` \|", MAP, re.M)) == folders


def test_every_file_that_the_readme_names_exists() -> None:
    named = set(
        re.findall(r"`?((?:configs|docs|tools|benchmarks|envs)/[\w./]+\.(?:py|md))`?", README)
    )
    assert len(named) > 4
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
