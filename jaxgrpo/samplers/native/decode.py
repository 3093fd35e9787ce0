"""Incremental forward passes over cached keys and values.

`extend` computes many new tokens per row. `run_steps` decodes one token per row and step, in a loop
on the device.

The keys and values of a row are in two places. Those of its group's prompt, without the prompt's
last token, are stored once per group. Its own start with the prompt's last token, as in
`qwen2.forward_shared_prompt`. Both are in a pool of pages of `PAGE` tokens. A computation gathers
the pages that it needs.

Axes in addition to those of jaxgrpo.types: B rows of a computation, S cached tokens, J pages of one
sequence, R gathered sequences, M queries that share a key head, E end tokens. Keys are stored with
tokens last and values with the head size last, so that no step transposes them.

Layers are unrolled, and weights and caches are one array per layer: a scan over stacked layers
would copy the weights of each layer at every step.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.config.settings import PAGE
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.numerics import einsum_float32
from jaxgrpo.models.qwen2 import Params, head_table, merge_layer, rms_norm
from jaxgrpo.samplers.native.sampling import Given, sample

_MASKED = -1e30  # finite, so that a part with all keys masked merges with weight 0, without NaN


class KeysValues(NamedTuple):
    """Keys [*, K, h, S] and values [*, K, S, h] of one layer.

    In the pool, the first axis is the page and S is `PAGE`.
    """

    keys: Array
    values: Array


Caches = tuple[KeysValues, ...]  # one entry per layer


class Layout(NamedTuple):
    """Which rows share which prompt.

    Row `rows_NG[n, g]` attends to prompt n. Row b is in slot `slots_B[b]` of the flattened grid.
    Three rows, the last two of one group: rows_NG [[0, 0], [1, 2]], slots_B [0, 2, 3]. An unused
    slot may name any row.
    """

    rows_NG: Given
    slots_B: Given


class Context(NamedTuple):
    """The cached keys and values that B rows attend to in addition to their new tokens."""

    layout: Layout
    shared: Caches
    shared_lengths_N: Given
    own: Caches
    own_lengths_B: Given


class DecodeRows(NamedTuple):
    """The rows of a decode chunk, and how to sample their tokens.

    `tokens_B` are the last tokens, which are not cached yet, at `positions_B`. A row of `limits_B`
    0 is empty. A token of `eos_E` ends a row. One call of `run_steps` takes up to `steps` steps.
    """

    tokens_B: Given
    positions_B: Given
    limits_B: Given
    seeds_B2: Given
    temperatures_B: Given
    top_ps_B: Given
    eos_E: Given
    steps: Given


class Chunk(NamedTuple):
    """The tokens of a decode chunk. The first `counts_B[b]` entries of row b are valid."""

    tokens_BC: Array
    logprobs_BC: Array
    counts_B: Array


class Progress(NamedTuple):
    """A chunk after `step` steps: last tokens, rows that are still running, and all tokens."""

    step: Array
    tokens_B: Array
    running_B: Array
    chunk: Chunk


@functools.partial(jax.jit, static_argnames=("dtype",))
def serving_params(params: Params, dtype: Any) -> Params:
    """Convert the logical tree to the one that this module computes with.

    It is cast to `dtype`, `layers` is a tuple of one tree per layer, and `head` is [D, V]. The head
    is transposed once here, because XLA's CPU backend needs 1.4 times as long per step for the
    product with the stored layout. Tied embeddings are looked up in the same array.
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
    """Return a pool of zeroed pages."""
    k, h = config.kv_heads, config.head_dim
    return tuple(
        KeysValues(jnp.zeros((pages, k, h, PAGE), dtype), jnp.zeros((pages, k, PAGE, h), dtype))
        for _ in range(config.layers)
    )


@jax.jit
def gather_pages(pool: Caches, pages_RJ: Given) -> Caches:
    """Gather each sequence's pages: keys [R, K, h, J * PAGE], values [R, K, J * PAGE, h]."""
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
    """Store new keys [B, K, h, T] and values [B, K, T, h] at the (page, offset) of each token.

    Tokens whose page is past the end of the pool are dropped.
    """

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
    """Attention over one part of the keys.

    `out` [R, K, M, h] is not normalized. `maximum` and `total` [R, K, M] are the maximum of the
    scores and the sum of their exponentials.
    """

    out: Array
    maximum: Array
    total: Array


def _attend_part(q_RKMh: Array, cache: KeysValues, mask: Array) -> _Part:
    """Attend with float32 scores. The mask is broadcastable to [R, K, M, S]."""
    scores = einsum_float32("rkmh,rkhs->rkms", q_RKMh, cache.keys)
    scores = jnp.where(mask, scores, _MASKED)
    maximum = scores.max(-1)
    weights = jnp.exp(scores - maximum[..., None])
    out = einsum_float32("rkms,rksh->rkmh", weights.astype(cache.values.dtype), cache.values)
    return _Part(out, maximum, weights.sum(-1))


def _merge(parts: list[_Part]) -> Array:
    """Merge the softmax over the keys of all parts (arXiv:2112.05682, section 2): [R, K, M, h]."""
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
    """Attend from queries [B, T, H, h] to the group's prompt, the row's cache and its new tokens.

    Returns [B, T, H, h]. `mask_TC` masks the new tokens. One product serves the queries of all rows
    of a group, so the prompt's keys are never copied.
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
    """Attend to the prompts with queries arranged as [N, K, G * M, h]; return results per row."""
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
    """Convert projected keys and values [B, T, K, h] to the cache's layout."""
    return KeysValues(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))


@functools.partial(jax.jit, static_argnames=("config",))
def extend(
    config: ModelConfig, params: Params, context: Context, ids_BT: Given, positions_B: Given
) -> Caches:
    """Compute keys and values of new tokens, of which the first are at `positions_B`.

    Padding tokens on the right give entries that must not be read.
    """
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
    rows: DecodeRows,
    progress: Progress,
    buffers: Caches,
) -> tuple[Array, Caches]:
    """Compute the float32 logits [B, V] that follow each row's last token.

    The keys and values of these tokens go to entry `progress.step` of the buffers.
    """
    step, positions_B = progress.step, jnp.asarray(rows.positions_B) + progress.step
    mask = (jnp.arange(buffers[0].keys.shape[-1]) <= step)[None]
    x = _embed(params, progress.tokens_B[:, None])
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
    logits_BV = jnp.einsum("bd,dv->bv", hidden, params["head"], preferred_element_type=jnp.float32)
    return logits_BV, tuple(made)


@functools.partial(jax.jit, static_argnames=("config", "steps", "dtype"))
def begin_chunk(
    config: ModelConfig, rows: DecodeRows, *, steps: int, dtype: Any
) -> tuple[Progress, Caches]:
    """Make an empty chunk of up to `steps` tokens per row, and buffers for its keys and values.

    The buffers hold keys [B, K, h, steps] and values [B, K, steps, h].
    """
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


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames="buffers")
def run_steps(
    config: ModelConfig,
    params: Params,
    context: Context,
    rows: DecodeRows,
    progress: Progress,
    buffers: Caches,
) -> tuple[Progress, Caches]:
    """Decode up to `rows.steps` further tokens per row, within the chunk.

    A row stops at its limit or after an end token, and the loop stops when all rows have. The
    buffers then hold the keys and values of the chunk's inputs `rows.tokens_B` and of all its
    tokens but the last.
    """
    end = jnp.minimum(progress.step + rows.steps, progress.chunk.tokens_BC.shape[1])

    def live(state: tuple[Progress, Caches]) -> Array:
        return (state[0].step < end) & state[0].running_B.any()

    def body(state: tuple[Progress, Caches]) -> tuple[Progress, Caches]:
        progress, buffers = state
        logits_BV, buffers = _decode_step(config, params, context, rows, progress, buffers)
        step, _, running_B, chunk = progress
        positions_B = jnp.asarray(rows.positions_B) + step
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
        running_B &= (chunk.counts_B < rows.limits_B) & ~jnp.isin(tokens_B, rows.eos_E)
        return Progress(step + 1, tokens_B, running_B, chunk), buffers

    return jax.lax.while_loop(live, body, (progress, buffers))
