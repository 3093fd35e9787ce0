"""Play and time turns of a sampler."""

import asyncio
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from jaxgrpo.samplers.base import Sampler, SamplingRequest


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn to play: its prompt, its episode in the group, and its number of tokens."""

    group: str
    episode: int
    prompt_ids: np.ndarray
    tokens: int

    def request(self) -> SamplingRequest:
        name = f"{self.group}/{self.episode}"
        return SamplingRequest(
            self.group, name, self.prompt_ids, len(self.prompt_ids), self.tokens, seed=self.episode
        )


async def play(sampler: Sampler, turns: Sequence[Turn]) -> float:
    """Play all turns at once, and return the seconds.

    Raises RuntimeError if a turn ends early, because it would look fast.
    """
    start = time.perf_counter()
    generations = await asyncio.gather(*[sampler.generate(turn.request()) for turn in turns])
    seconds = time.perf_counter() - start
    if any(
        len(generation.token_ids_T) != turn.tokens
        for generation, turn in zip(generations, turns, strict=True)
    ):
        raise RuntimeError("a turn ended before its last token: the rates would not compare")
    return seconds


async def release(sampler: Sampler, turns: Sequence[Turn]) -> None:
    for turn in turns:
        await sampler.release(turn.request().episode_id)
