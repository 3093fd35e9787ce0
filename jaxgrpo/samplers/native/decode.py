"""Incremental forward passes over caches: extend (many new tokens a row) and decode (one token a step, the loop on the device).

A row's keys and values are in two places: those of its group's prompt, less the prompt's last token, stored once for the group; and its
own, which start with the prompt's last token (as in `qwen2.forward_shared_prompt`). Both live in a pool of pages of `PAGE` tokens, and a
computation gathers the pages that it needs. Axes beside those of jaxgrpo.types: B rows of a computation, S cached tokens, J pages of one
sequence. Keys are stored with their tokens last, values with their head size last: so neither is transposed in a step.

Layers are unrolled, and weights and caches are one array a layer: a scan over stacked layers would copy each layer's weights at every step.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgrpo.config.settings import PAGE
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.numerics import einsum_float32
from jaxgrpo.models.qwen2 import Params, head_table, merge_layer, rms_norm

_MASKED = -1e30  # finite: a part with nothing to attend weighs exactly nothing once it is merged with one that has something


class KeysValues(NamedTuple):
    """One layer's keys [*, K, h, S] and values [*, K, S, h]; in the pool the leading axis is the page and S is `PAGE`."""

    keys: Array
    values: Array


Caches = tuple[KeysValues, ...]  # one entry a layer
Given = Array | np.ndarray  # the host builds it, a compiled function takes it


class Layout(NamedTuple):
    """Which rows share which prompt: row `rows_NG[n, g]` attends to prompt n, and row b sits in slot `slots_B[b]` of the flattened grid.

    Three rows, the last two of one group: rows_NG [[0, 0], [1, 2]] (an unused slot names any row), slots_B [0, 2, 3].
    """

    rows_NG: Given
    slots_B: Given


class Context(NamedTuple):
    """What B rows attend to beside their new tokens."""

    layout: Layout
    shared: Caches
    shared_lengths_N: Given
    own: Caches
    own_lengths_B: Given


class DecodeRows(NamedTuple):
    """The rows of a decode chunk: the last token (not in the cache yet), its position, and how to sample. `limits_B` 0 is an empty row."""

    tokens_B: Given
    positions_B: Given
    limits_B: Given
    seeds_B2: Given
    temperatures_B: Given
    top_ps_B: Given


class Chunk(NamedTuple):
    """What a decode chunk made: the first `counts_B[b]` entries of row b's tokens are real."""

    tokens_BC: Array
    logprobs_BC: Array
    counts_B: Array


class Progress(NamedTuple):
    """A chunk after `step` steps: each row's last token, whether it goes on, and all that was made so far."""

    step: Array
    tokens_B: Array
    running_B: Array
    chunk: Chunk


@functools.partial(jax.jit, static_argnames=("dtype",))
def serving_params(params: Params, dtype: Any) -> Params:
    """The tree that this module computes with: cast to the compute dtype, `layers` a tuple of one tree a layer, `head` [D, V].

    The head's table is turned round once, here: as it is stored, XLA's CPU backend takes 1.4 times as long for its product at every step.
    Tied embeddings are looked up in the same array.
    """
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    count = jax.tree.leaves(cast["layers"])[0].shape[0]
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], cast["layers"]) for i in range(count))
    tables = {"head": head_table(cast).T} | ({"embed": cast["embed"]} if "lm_head" in cast else {})
    return {"layers": layers, "norm": cast["norm"]} | tables


def _embed(params: Params, ids_BT: Array) -> Array:
    """[B, T] -> [B, T, D]."""
    return (
        params["embed"]["embedding"][ids_BT]
        if "embed" in params
        else jnp.moveaxis(params["head"][:, ids_BT], 0, -1)
    )


def empty_pool(config: ModelConfig, pages: int, dtype: Any) -> Caches:
    """A pool of zeroed pages."""
    k, h = config.kv_heads, config.head_dim
    return tuple(
        KeysValues(jnp.zeros((pages, k, h, PAGE), dtype), jnp.zeros((pages, k, PAGE, h), dtype))
        for _ in range(config.layers)
    )


@jax.jit
def gather_pages(pool: Caches, pages_RJ: Given) -> Caches:
    """The sequences whose pages are listed, each as one stretch: keys [R, K, h, J * PAGE], values [R, K, J * PAGE, h]."""
    chex.assert_rank(pages_RJ, 2)
    r, j = pages_RJ.shape

    def one(layer: KeysValues) -> KeysValues:
        _, k, h, _ = layer.keys.shape
        keys = layer.keys[pages_RJ].transpose(0, 2, 3, 1, 4).reshape(r, k, h, j * PAGE)
        values = layer.values[pages_RJ].transpose(0, 2, 1, 3, 4).reshape(r, k, j * PAGE, h)
        return KeysValues(keys, values)

    return tuple(one(layer) for layer in pool)


@functools.partial(jax.jit, donate_argnums=0)
def write_pages(pool: Caches, new: Caches, pages_BT: Given, offsets_BT: Given) -> Caches:
    """Store new keys [B, K, h, T] and values [B, K, T, h] at (page, offset) of each token; a page past the pool drops its token."""

    def one(layer: KeysValues, fresh: KeysValues) -> KeysValues:
        keys = layer.keys.at[pages_BT, :, :, offsets_BT].set(
            fresh.keys.transpose(0, 3, 1, 2), mode="drop"
        )
        values = layer.values.at[pages_BT, :, offsets_BT].set(
            fresh.values.transpose(0, 2, 1, 3), mode="drop"
        )
        return KeysValues(keys, values)

    return tuple(one(layer, fresh) for layer, fresh in zip(pool, new, strict=True))


class _Part(NamedTuple):
    """Attention over one part of the keys: unnormalised output [R, K, M, h], and maximum and sum of the scores' exponentials [R, K, M]."""

    out: Array
    maximum: Array
    total: Array


def _attend_part(q_RKMh: Array, cache: KeysValues, mask: Array) -> _Part:
    """Scores in float32; mask broadcastable to [R, K, M, S]."""
    scores = einsum_float32("rkmh,rkhs->rkms", q_RKMh, cache.keys)
    scores = jnp.where(mask, scores, _MASKED)
    maximum = scores.max(-1)
    weights = jnp.exp(scores - maximum[..., None])
    out = einsum_float32("rkms,rksh->rkmh", weights.astype(cache.values.dtype), cache.values)
    return _Part(out, maximum, weights.sum(-1))


def _merge(parts: list[_Part]) -> Array:
    """One softmax over the keys of all parts (arXiv:2112.05682, section 2): [R, K, M, h]."""
    maximum = functools.reduce(jnp.maximum, [part.maximum for part in parts])
    scales = [jnp.exp(part.maximum - maximum) for part in parts]
    total = functools.reduce(
        jnp.add, [part.total * scale for part, scale in zip(parts, scales, strict=True)]
    )
    return (
        functools.reduce(
            jnp.add,
            [part.out * scale[..., None] for part, scale in zip(parts, scales, strict=True)],
        )
        / total[..., None]
    )


def attend_cached(q: Array, context: Context, layer: int, new: KeysValues, mask_TC: Array) -> Array:
    """Queries [B, T, H, h] over the group's prompt, the row's cache and its new tokens (masked by mask_TC): [B, T, H, h].

    The prompt's keys meet the queries of all rows of the group in one product: they are never copied for a row.
    """
    b, t, heads, h = q.shape
    kv = new.keys.shape[1]
    repeat = heads // kv
    grouped = (
        (q * h**-0.5)
        .reshape(b, t, kv, repeat, h)
        .transpose(0, 2, 1, 3, 4)
        .reshape(b, kv, t * repeat, h)
    )
    own = context.own[layer]
    own_mask = jnp.arange(own.keys.shape[-1]) < context.own_lengths_B[:, None]
    parts = [
        _attend_shared(grouped, context, layer),
        _attend_part(grouped, own, own_mask[:, None, None]),
        _attend_part(grouped, new, jnp.repeat(mask_TC, repeat, axis=0)),
    ]
    merged = _merge(parts).astype(q.dtype)
    return merged.reshape(b, kv, t, repeat, h).transpose(0, 2, 1, 3, 4).reshape(b, t, heads, h)


def _attend_shared(q_BKMh: Array, context: Context, layer: int) -> _Part:
    """The rows' queries laid out as [N, K, G * M, h] over the prompts, and the result back in rows."""
    cache, (rows_NG, slots_B) = context.shared[layer], context.layout
    n, g = rows_NG.shape
    _, k, m, h = q_BKMh.shape
    q = q_BKMh[rows_NG].transpose(0, 2, 1, 3, 4).reshape(n, k, g * m, h)
    mask = jnp.arange(cache.keys.shape[-1]) < context.shared_lengths_N[:, None]
    part = _attend_part(q, cache, mask[:, None, None])

    def to_rows(x: Array) -> Array:
        x = x.reshape(n, k, g, m, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(n * g, k, m, *x.shape[4:])[slots_B]

    return _Part(to_rows(part.out), to_rows(part.maximum), to_rows(part.total))


def _to_cache(k: Array, v: Array) -> KeysValues:
    """Projected keys and values [B, T, K, h] in the cache's layout."""
    return KeysValues(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))


@functools.partial(jax.jit, static_argnames=("config",))
def extend(
    config: ModelConfig, params: Params, context: Context, ids_BT: Given, positions_B: Given
) -> Caches:
    """Keys and values of new tokens, the first at `positions_B`; padding on the right makes keys that nobody may read."""
    t = ids_BT.shape[1]
    positions_BT = jnp.asarray(positions_B)[:, None] + jnp.arange(t)
    mask = jnp.tril(jnp.ones((t, t), bool))
    x = _embed(params, jnp.asarray(ids_BT))
    made = []
    for layer, weights in enumerate(params["layers"]):
        block = merge_layer(config, weights)
        q, k, v = block.project(x, positions_BT)
        made.append(_to_cache(k, v))
        x = block.finish(x, attend_cached(q, context, layer, made[-1], mask))
    return tuple(made)


def _decode_step(
    config: ModelConfig,
    params: Params,
    context: Context,
    buffers: Caches,
    tokens_B: Array,
    positions_B: Array,
    step: Array,
) -> tuple[Array, Caches]:
    """Float32 logits [B, V] after one token a row, whose keys and values go to entry `step` of the buffers."""
    mask = (jnp.arange(buffers[0].keys.shape[-1]) <= step)[None]
    x = _embed(params, tokens_B[:, None])
    made = []
    for layer, weights in enumerate(params["layers"]):
        block = merge_layer(config, weights)
        q, k, v = block.project(x, positions_B[:, None])
        new = _to_cache(k, v)
        keys = jax.lax.dynamic_update_slice_in_dim(buffers[layer].keys, new.keys, step, axis=3)
        values = jax.lax.dynamic_update_slice_in_dim(
            buffers[layer].values, new.values, step, axis=2
        )
        made.append(KeysValues(keys, values))
        x = block.finish(x, attend_cached(q, context, layer, made[-1], mask))
    hidden = rms_norm(x[:, 0], params["norm"]["scale"], config.norm_epsilon)
    return jnp.einsum(
        "bd,dv->bv", hidden, params["head"], preferred_element_type=jnp.float32
    ), tuple(made)


@functools.partial(jax.jit, static_argnames=("config", "steps", "dtype"))
def begin_chunk(
    config: ModelConfig, rows: DecodeRows, *, steps: int, dtype: Any
) -> tuple[Progress, Caches]:
    """A chunk of up to `steps` tokens a row before its first step, and the buffers for its keys [B, K, h, steps] and values."""
    b = len(rows.tokens_B)
    shape = (b, config.kv_heads, config.head_dim, steps)
    buffers = tuple(
        KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype).mT)
        for _ in range(config.layers)
    )
    chunk = Chunk(
        jnp.zeros((b, steps), jnp.int32),
        jnp.zeros((b, steps), jnp.float32),
        jnp.zeros(b, jnp.int32),
    )
    return Progress(
        jnp.int32(0), jnp.asarray(rows.tokens_B), jnp.asarray(rows.limits_B) > 0, chunk
    ), buffers


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="buffers")
def run_steps(
    config: ModelConfig,
    params: Params,
    context: Context,
    rows: DecodeRows,
    eos_E: Array,
    progress: Progress,
    buffers: Caches,
    *,
    steps: int,
) -> tuple[Progress, Caches]:
    """Up to `steps` further tokens a row, within the chunk; a row stops at its limit or after a token of eos_E, the loop when all have.

    The buffers then hold the keys and values of `tokens_B` and of the tokens made, less the last.
    """
    end = jnp.minimum(progress.step + steps, progress.chunk.tokens_BC.shape[1])

    def live(state: tuple[Progress, Caches]) -> Array:
        return (state[0].step < end) & state[0].running_B.any()

    def body(state: tuple[Progress, Caches]) -> tuple[Progress, Caches]:
        (step, last_B, running_B, chunk), buffers = state
        positions_B = jnp.asarray(rows.positions_B) + step
        logits_BV, buffers = _decode_step(
            config, params, context, buffers, last_B, positions_B, step
        )
        tokens_B, logprobs_B = sample(
            logits_BV, rows.seeds_B2, positions_B + 1, rows.temperatures_B, rows.top_ps_B
        )
        chunk = Chunk(
            jax.lax.dynamic_update_slice_in_dim(chunk.tokens_BC, tokens_B[:, None], step, axis=1),
            jax.lax.dynamic_update_slice_in_dim(
                chunk.logprobs_BC, logprobs_B[:, None], step, axis=1
            ),
            chunk.counts_B + running_B,
        )
        running_B &= (chunk.counts_B < rows.limits_B) & ~jnp.isin(tokens_B, eos_E)
        return Progress(step + 1, tokens_B, running_B, chunk), buffers

    return jax.lax.while_loop(live, body, (progress, buffers))


def sample(
    logits_BV: Array, seeds_B2: Given, positions_B: Given, temperatures_B: Given, top_ps_B: Given
) -> tuple[Array, Array]:
    """Tokens [B] and their log-probabilities [B] before top-p: argmax of log p + Gumbel noise, or of the logits at temperature 0.

    The noise of a row is a function of its seed (two 32-bit words) and of the token's position, so a row does not depend on its batch.
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
    """The first index of each row's maximum. Two plain reductions: on CPUs, jnp.argmax is not vectorised and takes five times as long."""
    v = scores_BV.shape[1]
    best_BV = scores_BV == scores_BV.max(-1, keepdims=True)
    return jnp.where(best_BV, jnp.arange(v), v).min(-1).astype(jnp.int32)


def nucleus(logprobs_BV: Array, top_ps_B: Given) -> Array:
    """Top-p (arXiv:1904.09751): true for the most probable tokens whose mass reaches top_p, all tokens where it is 1.

    The least kept probability is found by bisection over the bits of non-negative floats, whose order is that of the floats: no sort.
    Tokens as probable as the least one kept are kept too.
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
