"""The sampler's protocol: token ids in; token ids, log-probabilities and weight versions out."""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class SamplerError(RuntimeError):
    """The sampler cannot go on; the message says why, the cause is chained where there is one."""


class FinishReason(enum.StrEnum):
    """Why one generation ended."""

    EOS = "eos"  # an end-of-turn token, kept as the last of token_ids
    STOP = "stop"  # a stop string; the token that completed it is the last of token_ids
    LENGTH = "length"  # max_tokens were generated and nothing had ended the turn


@dataclasses.dataclass(frozen=True)
class SamplingRequest:
    """One turn to generate.

    `context_ids` is the whole episode so far; its first `prompt_length` tokens are the group's prompt, shared by all requests of
    `group_id`. `episode_id` names the episode across its turns, so that a sampler may keep its cache. Generation is a function of
    (weights, context_ids, seed, temperature, top_p) and of nothing else that runs beside it. `temperature` 0 is greedy.
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
                f"prompt_length {self.prompt_length} is outside the context of {len(self.context_ids)} tokens"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}"
            )


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a request led to; the arrays have one entry a generated token (T).

    `logprobs_T` are those of the tempered distribution before top-p: log softmax(logits / temperature); at temperature 0, of temperature 1.
    """

    token_ids_T: np.ndarray
    logprobs_T: np.ndarray
    weight_versions_T: np.ndarray
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if not len(self.token_ids_T) == len(self.logprobs_T) == len(self.weight_versions_T):
            raise ValueError(
                "token ids, log-probabilities and weight versions must be of one length"
            )


class PolicyWeights(Protocol):
    """The policy's weights, however they lie: each sampler takes them in the form that it serves."""

    def logical(self) -> Any:
        """The logical parameter tree of jaxgrpo.models.qwen2, whole: for computing in this process."""

    def write(self, version: int, root: Path) -> Path:
        """A new folder of shards under `root`, whole when this returns: for another process to read."""


class Sampler(Protocol):
    """Serves the policy's turns. All methods are safe to call from one event loop; many `generate` calls run at once."""

    async def generate(self, request: SamplingRequest) -> Generation:
        """Generate one turn."""

    async def release(self, episode_id: str) -> None:
        """The episode is over: whatever is cached for it may go."""

    async def publish(self, version: int, weights: PolicyWeights) -> Mapping[str, float]:
        """Serve these weights from now on; returns, when generations use them, the seconds that its stages took, by name."""

    async def close(self) -> None:
        """End what the sampler owns."""
