"""The sampler's protocol: token ids in; token ids, log-probabilities and weight versions out."""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class SamplerError(RuntimeError):
    """The sampler cannot continue. The message says why; the cause is chained if there is one."""


class FinishReason(enum.StrEnum):
    """Why one generation ended."""

    EOS = "eos"  # an end-of-turn token, kept as the last of token_ids
    STOP = "stop"  # a stop string; the token that completed it is the last of token_ids
    LENGTH = "length"  # max_tokens were generated and nothing had ended the turn


@dataclasses.dataclass(frozen=True)
class SamplingRequest:
    """One turn to generate.

    - `context_ids`: the whole episode so far. Its first `prompt_length` tokens are the group's
      prompt, which all requests of `group_id` share.
    - `episode_id`: names the episode across its turns, so that a sampler can keep its cache.
    - `temperature`: 0 is greedy. By default, tokens are drawn from the policy as it is.

    The generation depends only on the weights, `context_ids`, `seed`, `temperature` and `top_p`,
    not on other requests.
    """

    group_id: str
    episode_id: str
    context_ids: np.ndarray
    prompt_length: int
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.prompt_length <= len(self.context_ids):
            raise ValueError(
                f"prompt_length {self.prompt_length} is outside the context of"
                f" {len(self.context_ids)} tokens"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be >= 0 and top_p in (0, 1], got"
                f" {self.temperature} and {self.top_p}"
            )


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated turn. The arrays have one entry per generated token (T).

    `logprobs_T` are of the tempered distribution before top-p: log softmax(logits / temperature).
    At temperature 0 they are of temperature 1.
    """

    token_ids_T: np.ndarray
    logprobs_T: np.ndarray
    weight_versions_T: np.ndarray
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if not len(self.token_ids_T) == len(self.logprobs_T) == len(self.weight_versions_T):
            raise ValueError(
                "token ids, log-probabilities and weight versions must have the same length"
            )


class Sampler(Protocol):
    """Serves the policy's turns.

    All methods must be called from one event loop. Many `generate` calls may run at once.
    """

    @property
    def weights_folder(self) -> Path | None:
        """The folder into which new versions are written for this sampler. None if it takes the
        weights themselves."""

    async def generate(self, request: SamplingRequest) -> Generation:
        """Generate one turn."""

    async def release(self, episode_id: str) -> None:
        """Say that the episode is over, so that its cache may be dropped."""

    async def publish(self, version: int, weights: Any) -> Mapping[str, float]:
        """Serve these weights from now on: the folder of a version in `weights_folder`, or without
        one the logical tree of jaxgrpo.models.qwen2. Return the seconds of each stage by name, when
        generations use the weights."""

    async def close(self) -> None:
        """Release all resources of the sampler."""
