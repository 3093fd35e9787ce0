"""Samples tokens from logits: temperature, top-p and Gumbel noise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Given = Array | np.ndarray  # built on the host, passed to a compiled function


def sample(
    logits_BV: Array, seeds_B2: Given, positions_B: Given, temperatures_B: Given, top_ps_B: Given
) -> tuple[Array, Array]:
    """Sample tokens [B] and return their log-probabilities [B] before top-p.

    A token is the argmax of log p + Gumbel noise, or of the logits at temperature 0. The noise of a
    row depends only on its seed (two 32-bit words) and the token's position, not on the other rows.
    """
    chex.assert_rank([logits_BV, seeds_B2, positions_B, temperatures_B, top_ps_B], [2, 2, 1, 1, 1])
    v = logits_BV.shape[1]
    greedy_B = temperatures_B == 0
    logprobs_BV = jax.nn.log_softmax(logits_BV / jnp.where(greedy_B, 1.0, temperatures_B)[:, None])

    def noise_of(seed_2: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (v,))

    def draw(scores_BV: Array) -> Array:
        cut = (top_ps_B < 1) & ~greedy_B
        scores_BV = jax.lax.cond(
            cut.any(),
            lambda s: jnp.where(nucleus(s, top_ps_B), s, -jnp.inf),
            lambda s: s,
            scores_BV,
        )
        noise_BV = jax.vmap(noise_of)(jnp.asarray(seeds_B2), jnp.asarray(positions_B))
        return _argmax(jnp.where(greedy_B[:, None], logprobs_BV, scores_BV + noise_BV))

    tokens_B = jax.lax.cond(greedy_B.all(), _argmax, draw, logprobs_BV)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]


def _argmax(scores_BV: Array) -> Array:
    """Return the first index of each row's maximum.

    Uses two plain reductions, because jnp.argmax takes five times as long on CPUs.
    """
    v = scores_BV.shape[1]
    best_BV = scores_BV == scores_BV.max(-1, keepdims=True)
    return jnp.where(best_BV, jnp.arange(v), v).min(-1).astype(jnp.int32)


def nucleus(logprobs_BV: Array, top_ps_B: Given) -> Array:
    """Top-p (arXiv:1904.09751): true for the most probable tokens whose mass reaches `top_ps_B`.

    True for all tokens where top_p is 1. The smallest kept probability is found without a sort, by
    bisection over the bits of non-negative floats, which have the same order as the floats. Tokens
    as probable as the least probable kept one are kept as well.
    """
    probs_BV = jnp.exp(logprobs_BV)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = (low_B + high_B) // 2
        threshold_B = jax.lax.bitcast_convert_type(middle_B, jnp.float32)
        mass_B = jnp.where(probs_BV >= threshold_B[:, None], probs_BV, 0.0).sum(-1)
        enough_B = mass_B >= top_ps_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    one = jax.lax.bitcast_convert_type(jnp.float32(1.01), jnp.int32)
    low_B, _ = jax.lax.fori_loop(
        0, 31, halve, (jnp.zeros_like(top_ps_B, jnp.int32), jnp.full(top_ps_B.shape, one))
    )
    kept_BV = probs_BV >= jax.lax.bitcast_convert_type(low_B, jnp.float32)[:, None]
    return kept_BV | (top_ps_B[:, None] >= 1)
