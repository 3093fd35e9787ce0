"""Rotary positions and grouped-query attention over [a group's shared context; a row's own tokens]."""

import math

import jax
import jax.numpy as jnp
from jax import Array

_MASKED = -1e30  # finite, so that a row with nothing to attend is garbage and not NaN
_QUERY_BLOCK = 512  # queries a block: scores of a longer row never exist as a whole


def apply_rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotate x [..., T, heads, h] by its positions [..., T] (arXiv:2104.09864, the half-split form of Qwen); angles in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(length: int) -> Array:
    """[T, T], true where a key is not after its query."""
    return jnp.tril(jnp.ones((length, length), bool))


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    context_k: Array | None = None,
    context_v: Array | None = None,
    context_mask: Array | None = None,
) -> Array:
    """Softmax attention of rows over themselves and, where given, over the context that their group shares.

    q [N, G, T, H, h], k and v [N, G, S, K, h], mask broadcastable to [N, G, T, S]; context_k and context_v [N, P, K, h],
    context_mask [N, P]. Returns [N, G, T, H, h]. Softmax in float32. The context is never copied for the rows of a group.
    Long rows are computed in blocks of queries, rematerialised in the backward pass.
    """
    t = q.shape[2]
    if t <= _QUERY_BLOCK:
        return _attend_block(q, k, v, mask, context_k, context_v, context_mask)
    blocks = math.ceil(t / _QUERY_BLOCK)
    pad = blocks * _QUERY_BLOCK - t
    mask = jnp.broadcast_to(mask, (*mask.shape[:-2], t, mask.shape[-1]))

    def split(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, pad)
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], blocks, _QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def one(block: tuple[Array, Array]) -> Array:
        return _attend_block(block[0], k, v, block[1], context_k, context_v, context_mask)

    out = jax.lax.map(one, (split(q, 2), split(mask, mask.ndim - 2)))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], blocks * _QUERY_BLOCK, *out.shape[4:])[:, :, :t]


def _attend_block(
    q: Array, k: Array, v: Array, mask: Array, context_k: Array | None, context_v: Array | None, context_mask: Array | None
) -> Array:
    n, g, t, heads, size = q.shape
    kv_heads = k.shape[-2]
    q = q.reshape(n, g, t, kv_heads, heads // kv_heads, size) * size**-0.5
    own = jnp.einsum("ngtkqh,ngskh->ngkqts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.expand_dims(mask, (-4, -3)) if mask.ndim > 2 else mask, own, _MASKED)
    if context_k is not None:
        assert context_v is not None and context_mask is not None
        shared = jnp.einsum("ngtkqh,npkh->ngkqtp", q, context_k, preferred_element_type=jnp.float32)
        shared = jnp.where(context_mask[:, None, None, None, None, :], shared, _MASKED)
        scores = jnp.concatenate([shared, scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if context_k is None:
        out = jnp.einsum("ngkqts,ngskh->ngtkqh", weights, v)
    else:
        p = context_k.shape[1]
        out = jnp.einsum("ngkqtp,npkh->ngtkqh", weights[..., :p], context_v) + jnp.einsum("ngkqts,ngskh->ngtkqh", weights[..., p:], v)
    return out.reshape(n, g, t, heads, size)
