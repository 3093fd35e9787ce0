"""Rotary positions and grouped-query attention over [a group's shared context; a row's own tokens]."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.numerics import einsum_float32

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
    """All scores of a block at once, the axes brought into the order of `_merged_softmax`."""
    n, g, t, heads, size = q.shape
    kv_heads = k.shape[-2]
    q = jnp.moveaxis(q.reshape(n, g, t, kv_heads, heads // kv_heads, size) * size**-0.5, (3, 4), (1, 3))
    parts = [(jnp.moveaxis(k, 3, 1), jnp.moveaxis(v, 3, 1), mask if mask.ndim == 2 else mask[:, None, :, None])]
    if context_k is not None:
        assert context_v is not None and context_mask is not None
        parts.append((jnp.moveaxis(context_k, 2, 1), jnp.moveaxis(context_v, 2, 1), context_mask[:, None, None, None, None, :]))
    out = _merged_softmax(q, tuple(parts))
    return jnp.moveaxis(out, (1, 3), (3, 4)).reshape(n, g, t, heads, size)


# Axes inside: n groups, k key/value heads, g rows, q query heads of a key/value head, t queries, s keys, h. A row's own keys are
# [n, k, g, s, h], a shared context's [n, k, s, h]. Large arrays are [n, k, g, q, t, s] throughout: that is how the scores leave their
# product, and each product below is written so that none is transposed on its way in (autodiff's would be; measured in docs/log.md).
_Part = tuple[Array, Array, Array]  # keys, values, mask


def _keys(part: _Part) -> str:
    return "nkgsh" if part[0].ndim == 5 else "nksh"


@jax.custom_vjp
def _merged_softmax(q: Array, parts: tuple[_Part, ...]) -> Array:
    """Softmax attention of q [n, k, g, q, t, h] over the keys of all parts together; nothing is concatenated."""
    return _merged_softmax_forward(q, parts)[0]


def _merged_softmax_forward(q: Array, parts: tuple[_Part, ...]) -> tuple[Array, tuple]:
    scores = [jnp.where(part[2], einsum_float32(f"nkgqth,{_keys(part)}->nkgqts", q, part[0]), _MASKED) for part in parts]
    top = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
    weights = [jnp.exp(s - top) for s in scores]
    total = functools.reduce(jnp.add, [jnp.sum(w, axis=-1, keepdims=True) for w in weights])
    weights = [w.astype(part[1].dtype) for w, part in zip(weights, parts, strict=True)]
    outs = [einsum_float32(f"nkgqts,{_keys(part)}->nkgqth", w, part[1]) for w, part in zip(weights, parts, strict=True)]
    out = (functools.reduce(jnp.add, outs) / total).astype(q.dtype)
    return out, (q, parts, weights, total, out)


def _merged_softmax_backward(residuals: tuple, cotangent: Array) -> tuple[Array, tuple]:
    """With e the unnormalised weights, z their total, g = d out / z: dv = e' g, ds = e (g v' - sum(g out))."""
    q, parts, weights, total, out = residuals
    scaled = cotangent.astype(jnp.float32) / total
    centre = jnp.sum(scaled * out.astype(jnp.float32), axis=-1, keepdims=True)
    scaled = scaled.astype(q.dtype)
    dq, dparts = jnp.zeros(q.shape, jnp.float32), []
    for part, e in zip(parts, weights, strict=True):
        keys, values = part[:2]
        axes = _keys(part)
        transposed = axes[:-2] + "hs"
        dv = einsum_float32(f"nkgqth,nkgqts->{transposed}", scaled, e)
        de = einsum_float32(f"nkgqth,{axes}->nkgqts", scaled, values)
        ds = (e.astype(jnp.float32) * (de - centre)).astype(q.dtype)
        dk = einsum_float32(f"nkgqth,nkgqts->{transposed}", q, ds)
        dq = dq + einsum_float32(f"nkgqts,{axes}->nkgqth", ds, keys)
        dparts.append((dk.mT.astype(keys.dtype), dv.mT.astype(values.dtype), None))
    return dq.astype(q.dtype), tuple(dparts)


_merged_softmax.defvjp(_merged_softmax_forward, _merged_softmax_backward)
