"""Rotary positions, and attention of rows over their own tokens and the context of their group.

The softmax over a row's own keys and the context's is computed in two parts. Each part is computed
by a kernel that knows nothing of the other part, and the parts are merged by their log-sum-exps.
The gradient is written by hand: the backward pass of each part takes the merged output and
log-sum-exp (FlashAttention-2, arXiv:2307.08691, section 3.1; ring attention merges its parts in the
same way, arXiv:2310.01889). Scores exist for one block of queries at a time and are computed again
in the backward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxgrpo.models.numerics import einsum_float32

MASKED = -1e30  # finite: a part without any key gets weight 0 rather than NaN
_QUERY_BLOCK = 256  # queries per block, so that their scores fit a CPU's cache
_CAUSAL_SEGMENTS = 8  # maximum number of segments of a causal row; each skips the keys after it

OUTPUT_NAMES = ("attention_output", "attention_logsumexp")
"""Arrays that a rematerialization policy may save to avoid repeating attention's forward pass."""


def apply_rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotate x [..., T, heads, h] by its positions [..., T], with angles in float32.

    RoPE (arXiv:2104.09864) in the half-split form of Qwen: dimensions i and i + h/2 form a
    pair.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attended(NamedTuple):
    """The output [B, T, H, h] of attention, and the log-sum-exp [B, T, H] of its scores, float32.

    Without any key, the log-sum-exp is about -1e30.
    """

    output: Array
    logsumexp: Array


class Context(NamedTuple):
    """The keys and values [N, P, K, h] that each group shares; the first `lengths` [N] are real."""

    k: Array
    v: Array
    lengths: Array


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Computes one part of attention: q [B, T, H, h] over k and v [B, S, K, h].

    With `lengths` [B], every query attends to the first `lengths` keys. With None, T equals S and
    attention is causal.

    - `forward(q, k, v, lengths)` returns the part's own output and log-sum-exp.
    - `backward(q, k, v, lengths, whole, d_output)` returns the gradients of q, k and v. `whole` is
      the output and log-sum-exp of the whole softmax, of which this part may hold only some keys.
    """

    name: str
    forward: Callable[[Array, Array, Array, Array | None], Attended]
    backward: Callable[
        [Array, Array, Array, Array | None, Attended, Array], tuple[Array, Array, Array]
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(kernel: Kernel, q: Array, k: Array, v: Array, context: Context | None = None) -> Array:
    """Causal attention of each row to itself and, if there is one, to the context of its group.

    q [N, G, T, H, h], k and v [N, G, T, K, h] -> [N, G, T, H, h]: softmax(q k' / sqrt(h)) v, with
    the softmax in float32. The context is never copied for the rows of a group.
    """
    return _attend_forward(kernel, q, k, v, context)[0]


def _each_row(x: Array) -> Array:
    """[N, G, T, ...] -> [N * G, T, ...]: the queries of a row meet its own keys."""
    return x.reshape(-1, *x.shape[2:])


def _whole_group(x: Array) -> Array:
    """[N, G, T, ...] -> [N, G * T, ...]: all queries of a group meet its context at once."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _attend_forward(
    kernel: Kernel, q: Array, k: Array, v: Array, context: Context | None
) -> tuple[Array, tuple[Any, ...]]:
    chex.assert_rank([q, k, v], 5)
    output, logsumexp = kernel.forward(_each_row(q), _each_row(k), _each_row(v), None)
    output, logsumexp = output.reshape(q.shape), logsumexp.reshape(q.shape[:-1])
    if context is not None:
        theirs, their_logsumexp = kernel.forward(_whole_group(q), *context)
        theirs, their_logsumexp = theirs.reshape(q.shape), their_logsumexp.reshape(logsumexp.shape)
        merged = jnp.logaddexp(logsumexp, their_logsumexp)
        share, their_share = jnp.exp(logsumexp - merged), jnp.exp(their_logsumexp - merged)
        output = (output * share[..., None] + theirs * their_share[..., None]).astype(q.dtype)
        logsumexp = merged
    output, logsumexp = (
        checkpoint_name(x, name) for x, name in zip((output, logsumexp), OUTPUT_NAMES, strict=True)
    )
    return output, (q, k, v, context, output, logsumexp)


def _attend_backward(
    kernel: Kernel, residuals: tuple[Any, ...], d_output: Array
) -> tuple[Any, ...]:
    q, k, v, context, output, logsumexp = residuals
    own = (_each_row(q), _each_row(k), _each_row(v))
    whole = Attended(_each_row(output), _each_row(logsumexp))
    dq, dk, dv = kernel.backward(*own, None, whole, _each_row(d_output))
    dq, dk, dv = dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
    if context is None:
        return dq, dk, dv, None
    queries = _whole_group(q)
    whole = Attended(_whole_group(output), _whole_group(logsumexp))
    more, d_context_k, d_context_v = kernel.backward(
        queries, context.k, context.v, context.lengths, whole, _whole_group(d_output)
    )
    return dq + more.reshape(q.shape), dk, dv, Context._make((d_context_k, d_context_v, None))


attend.defvjp(_attend_forward, _attend_backward)


# The kernel in plain XLA. Axes: B batch, K key/value heads, M the queries of all query heads that
# share a key/value head (in the order query, head), S keys. Scores are always [B, K, M, S], as
# their product returns them, because XLA's CPU backend transposes operands in a slow plain loop
# (docs/log.md).


def _split_heads(x: Array, kv_heads: int) -> Array:
    """[B, T, H, ...] -> [B, K, M, ...]."""
    b, t, heads = x.shape[:3]
    return jnp.moveaxis(x.reshape(b, t, kv_heads, heads // kv_heads, *x.shape[3:]), 2, 1).reshape(
        b, kv_heads, -1, *x.shape[3:]
    )


def _join_heads(x: Array, shape: tuple[int, ...]) -> Array:
    """[B, K, M, ...] -> `shape` [B, T, H, ...]."""
    b, kv_heads = x.shape[:2]
    return jnp.moveaxis(
        x.reshape(b, kv_heads, shape[1], shape[2] // kv_heads, *shape[3:]), 1, 2
    ).reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Consecutive queries, cut into blocks, and the number of keys that they may attend to."""

    start: int
    blocks: int
    block: int
    keys: int


def _segments(queries: int, keys: int, causal: bool) -> list[_Segment]:
    """Cut the queries into segments of whole blocks; the last block may need padding."""
    block = min(queries, _QUERY_BLOCK)
    blocks = math.ceil(queries / block)
    each = math.ceil(blocks / _CAUSAL_SEGMENTS) if causal else blocks
    firsts = range(0, blocks, each)
    return [
        _Segment(
            i * block,
            min(each, blocks - i),
            block,
            min(keys, (i + each) * block) if causal else keys,
        )
        for i in firsts
    ]


def _blocks(x: Array, segment: _Segment, heads: int) -> Array:
    """x [B, K, M, ...], padded at the end -> blocks [blocks, B, K, block * heads, ...]."""
    part = x[:, :, segment.start * heads :][:, :, : segment.blocks * segment.block * heads]
    return jnp.moveaxis(part.reshape(*part.shape[:2], segment.blocks, -1, *part.shape[3:]), 2, 0)


def _padded(x: Array, segments: list[_Segment], queries: int, heads: int) -> Array:
    """Pad x [B, K, M, ...] with zeros to fill the last block of queries."""
    missing = segments[-1].start + segments[-1].blocks * segments[-1].block - queries
    return (
        x
        if missing == 0
        else jnp.pad(x, [(0, 0), (0, 0), (0, missing * heads)] + [(0, 0)] * (x.ndim - 3))
    )


def _scores(q: Array, k: Array, first: Array, heads: int, lengths: Array | None) -> Array:
    """Return scaled scores [B, K, M, S] of the block that begins at query `first`.

    They are `MASKED` where a query may not attend.
    """
    keys = jnp.arange(k.shape[2])
    scores = einsum_float32("bkmh,bksh->bkms", q, k) * q.shape[-1] ** -0.5
    if lengths is None:
        allowed = keys <= (first + jnp.arange(q.shape[2]) // heads)[:, None]
    else:
        allowed = keys < lengths[:, None, None, None]
    return jnp.where(allowed, scores, MASKED)


def _forward(q: Array, k: Array, v: Array, lengths: Array | None) -> Attended:
    queries, heads, kv_heads = q.shape[1], q.shape[2] // k.shape[2], k.shape[2]
    segments = _segments(queries, k.shape[1], lengths is None)
    rows = _padded(_split_heads(q, kv_heads), segments, queries, heads)
    keys, values = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
    outputs, logsumexps = [], []
    for segment in segments:

        def one(args: tuple[Array, Array], segment: _Segment = segment) -> tuple[Array, Array]:
            block, first = args
            scores = _scores(block, keys[:, :, : segment.keys], first, heads, lengths)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            seen = values[:, :, : segment.keys]
            output = einsum_float32("bkms,bksh->bkmh", weights.astype(v.dtype), seen) / total
            return output.astype(q.dtype), (top + jnp.log(total))[..., 0]

        output, logsumexp = lax.map(one, (_blocks(rows, segment, heads), _firsts(segment)))
        outputs.append(_unblocked(output))
        logsumexps.append(_unblocked(logsumexp))

    def join(parts: list[Array], shape: tuple[int, ...]) -> Array:
        return _join_heads(jnp.concatenate(parts, axis=2)[:, :, : queries * heads], shape)

    return Attended(join(outputs, q.shape), join(logsumexps, q.shape[:-1]))


def _firsts(segment: _Segment) -> Array:
    return segment.start + segment.block * jnp.arange(segment.blocks)


def _unblocked(x: Array) -> Array:
    """[blocks, B, K, M of a block, ...] -> [B, K, M, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _backward(
    q: Array, k: Array, v: Array, lengths: Array | None, whole: Attended, d_output: Array
) -> tuple[Array, Array, Array]:
    """dv = p' do and dscores = p (do v' - sum(do output)), with p = exp(scores - logsumexp).

    FlashAttention-2 (arXiv:2307.08691, algorithm 2). Sums over queries are float32.
    """
    queries, heads, kv_heads = q.shape[1], q.shape[2] // k.shape[2], k.shape[2]
    segments = _segments(queries, k.shape[1], lengths is None)
    centre = jnp.sum(d_output.astype(jnp.float32) * whole.output.astype(jnp.float32), axis=-1)
    rows = tuple(
        _padded(_split_heads(x, kv_heads), segments, queries, heads)
        for x in (q, d_output, whole.logsumexp, centre)
    )
    keys, values = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
    scale = q.shape[-1] ** -0.5
    dqs = []
    # [B, K, h, S] each. Zeros made from k and v vary over the mesh as k and v do; a scan requires
    # that of its carry.
    total = tuple(jnp.where(False, x.mT.astype(jnp.float32), 0.0) for x in (keys, values))
    for segment in segments:
        seen_keys, seen_values = keys[:, :, : segment.keys], values[:, :, : segment.keys]

        def one(
            sums: tuple[Array, ...],
            args: tuple[Any, ...],
            seen: tuple[Array, Array] = (seen_keys, seen_values),
        ) -> tuple[tuple[Array, ...], Array]:
            (block, d_block, block_logsumexp, block_centre), first = args
            weights = jnp.exp(
                _scores(block, seen[0], first, heads, lengths) - block_logsumexp[..., None]
            )
            d_weights = einsum_float32("bkmh,bksh->bkms", d_block, seen[1])
            d_scores = (weights * (d_weights - block_centre[..., None]) * scale).astype(q.dtype)
            dk = sums[0] + einsum_float32("bkmh,bkms->bkhs", block, d_scores)
            dv = sums[1] + einsum_float32("bkmh,bkms->bkhs", d_block, weights.astype(v.dtype))
            return (dk, dv), einsum_float32("bkms,bksh->bkmh", d_scores, seen[0]).astype(q.dtype)

        start = tuple(x[..., : segment.keys] for x in total)
        sums, dq = lax.scan(
            one, start, (tuple(_blocks(x, segment, heads) for x in rows), _firsts(segment))
        )
        total = tuple(x.at[..., : segment.keys].set(s) for x, s in zip(total, sums, strict=True))
        dqs.append(_unblocked(dq))
    dq = _join_heads(jnp.concatenate(dqs, axis=2)[:, :, : queries * heads], q.shape)
    # Without the barrier, XLA merges the last product and this transposition into a product with
    # transposed scores.
    dk, dv = (jnp.moveaxis(x, (2, 3), (3, 1)) for x in lax.optimization_barrier(total))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


XLA = Kernel("xla", _forward, _backward)
