"""A small embedded sampler, requests to it, and the plain forward that its answers are held against, for several tests."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import cast_to, forward, head_table, init_params
from jaxgrpo.samplers.base import Generation, SamplingRequest
from jaxgrpo.samplers.native.sampler import NativeSampler
from tests.samplers.native.test_stops import TOKENIZER

T = TypeVar("T")


CONFIG = ModelConfig(261, 32, 2, 4, 2, 8, 48, 512, 1e4, 1e-6, True)
# Weights large enough that a token depends on the whole context and the distribution is neither flat nor a spike.
PARAMS = jax.tree.map(
    lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(1))
)
OTHER = jax.tree.map(
    lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(2))
)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 261, n).astype(np.int32) for n in (40, 90, 20)]


def make(**options: Any) -> NativeSampler:
    sizes = {"max_rows": 8, "decode_chunk": 4, "max_cache_tokens": 2048}
    return NativeSampler(
        CONFIG,
        PARAMS,
        TOKENIZER,
        **(sizes | {"compute_dtype": jnp.float32, "eos_token_ids": ()} | options),
    )


def request(
    group: int = 0, episode: int = 0, *, tail: Any = (), max_tokens: int = 10, **options: Any
) -> SamplingRequest:
    """A turn of episode `episode` of group `group`, whose context is the group's prompt and `tail`."""
    prompt = PROMPTS[group]
    context = np.concatenate([prompt, np.asarray(tail, np.int32)])
    options = {"seed": 100 * group + episode} | options
    return SamplingRequest(
        f"g{group}", f"g{group}e{episode}", context, len(prompt), max_tokens, **options
    )


def run(body: Callable[[NativeSampler], Awaitable[T]], **options: Any) -> T:
    """Run `body` on a sampler and close it."""

    async def main() -> T:
        sampler = make(**options)
        try:
            return await asyncio.wait_for(body(sampler), 120)
        finally:
            await sampler.close()

    return asyncio.run(main())


def generate(*requests: SamplingRequest, **options: Any) -> list[Generation]:
    """All requests at once on a fresh sampler."""

    async def body(sampler: NativeSampler) -> list[Generation]:
        return await asyncio.gather(*[sampler.generate(r) for r in requests])

    return run(body, **options)


def plain_logits(
    r: SamplingRequest, generation: Generation, params: Any = PARAMS, length: int = 128
) -> np.ndarray:
    """Logits [T, V] that the plain forward, fed with the produced ids padded to `length`, has for each produced token."""
    ids = np.concatenate([r.context_ids, generation.token_ids_T])
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    hidden = forward(CONFIG, params, padded, load=cast_to(jnp.float32))
    return np.asarray(hidden[0, len(r.context_ids) - 1 : len(ids) - 1] @ head_table(params).T)


def logprobs_of(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids)), ids]


def same(a: Generation, b: Generation) -> None:
    np.testing.assert_array_equal(a.token_ids_T, b.token_ids_T)
    np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=1e-5)
    assert a.finish_reason == b.finish_reason
