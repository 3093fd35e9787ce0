"""Rotary positions and attention, against direct float64 implementations; blocks of queries and a shared context."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo import attention
from jaxgrpo.attention import apply_rope, attend, causal_mask
from tests import reference

N, G, H, K, SIZE = 2, 3, 4, 2, 8


def heads(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, SIZE)).astype(np.float32)


def own(t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [N, G, T, H, h], keys and values [N, G, T, K, h]."""
    return heads(0, N, G, t, H), heads(1, N, G, t, K), heads(2, N, G, t, K)


def context(p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values [N, P, K, h], and a mask [N, P] that leaves the second group a shorter context."""
    mask = np.arange(p) < np.array([[p], [p - 2]])
    return heads(3, N, p, K), heads(4, N, p, K), mask


def test_rope_equals_a_turn_of_complex_numbers() -> None:
    x, positions = heads(0, 5, H), np.array([0, 1, 2, 77, 4000])
    expected = reference.rope(x, positions, 1e6)
    chex.assert_trees_all_close(np.asarray(apply_rope(x, jnp.asarray(positions), 1e6)), expected.astype(np.float32), atol=3e-4)


def test_rope_by_hand() -> None:
    # one pair, a quarter turn a position: (1, 0) at position 1 with theta such that the angle is 1 radian
    turned = apply_rope(jnp.array([[[1.0, 0.0]]]), jnp.array([1]), 10000.0)
    chex.assert_trees_all_close(turned, jnp.array([[[0.5403023, 0.8414710]]]), rtol=1e-6)  # cos 1, sin 1


def test_rope_keeps_the_dtype() -> None:
    assert apply_rope(jnp.ones((3, 1, 8), jnp.bfloat16), jnp.arange(3), 1e6).dtype == jnp.bfloat16


def test_causal_mask_written_out() -> None:
    assert causal_mask(3).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_attention_equals_float64_numpy() -> None:
    q, k, v = own(6)
    out = attend(q, k, v, causal_mask(6))
    expected = np.stack([[reference.attention(q[n, g], k[n, g], v[n, g], np.tri(6, dtype=bool)) for g in range(G)] for n in range(N)])
    chex.assert_trees_all_close(np.asarray(out), expected.astype(np.float32), atol=2e-6)


def test_a_mask_a_row_is_honoured() -> None:
    q, k, v = own(6)
    mask = np.random.default_rng(5).random((N, G, 6, 6)) < 0.5
    mask |= np.eye(6, dtype=bool)
    expected = np.stack([[reference.attention(q[n, g], k[n, g], v[n, g], mask[n, g]) for g in range(G)] for n in range(N)])
    chex.assert_trees_all_close(np.asarray(attend(q, k, v, jnp.asarray(mask))), expected.astype(np.float32), atol=2e-6)


def test_a_context_equals_its_keys_put_before_the_rows_own() -> None:
    (q, k, v), (context_k, context_v, mask) = own(6), context(5)
    out = attend(q, k, v, causal_mask(6), context_k, context_v, mask)
    expected = np.zeros(q.shape)
    for n in range(N):
        for g in range(G):
            whole_mask = np.concatenate([np.broadcast_to(mask[n], (6, 5)), np.tri(6, dtype=bool)], axis=1)
            keys, values = np.concatenate([context_k[n], k[n, g]]), np.concatenate([context_v[n], v[n, g]])
            expected[n, g] = reference.attention(q[n, g], keys, values, whole_mask)
    chex.assert_trees_all_close(np.asarray(out), expected.astype(np.float32), atol=2e-6)


def test_a_long_row_equals_float64_numpy() -> None:
    t = 530  # more than one block of queries, and no multiple of it
    q, k, v = (x[:1, :1] for x in own(t))
    out = attend(q, k, v, causal_mask(t))
    expected = reference.attention(q[0, 0], k[0, 0], v[0, 0], np.tri(t, dtype=bool))
    chex.assert_trees_all_close(np.asarray(out)[0, 0], expected.astype(np.float32), atol=5e-6)


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("block", [4, 5])
def test_blocks_of_queries_change_neither_value_nor_gradient(block: int, with_context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    t = 10
    shared = context(5) if with_context else (None, None, None)
    weights = heads(6, N, G, t, H)

    def value_and_gradients() -> tuple:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, ck: jax.Array | None, cv: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            out = attend(q, k, v, causal_mask(t), ck, cv, shared[2])
            return jnp.sum(out * weights), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4) if with_context else (0, 1, 2), has_aux=True))(*own(t), *shared[:2])

    unblocked = value_and_gradients()
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    chex.assert_trees_all_close(value_and_gradients(), unblocked, atol=5e-6)


def test_the_gradient_of_a_long_row_equals_the_unblocked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    t = 520
    q, k, v = (jnp.asarray(x[:1, :1]) for x in own(t))
    weights = heads(6, 1, 1, t, H)
    gradient = lambda: jax.jit(jax.grad(lambda *qkv: jnp.sum(attend(*qkv, causal_mask(t)) * weights), argnums=(0, 1, 2)))(q, k, v)
    blocked = gradient()
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 1024)
    chex.assert_trees_all_close(blocked, gradient(), atol=2e-5)


def test_masked_keys_and_values_do_not_matter() -> None:
    (q, k, v), (context_k, context_v, mask) = own(6), context(5)
    out = attend(q, k, v, causal_mask(6), context_k, context_v, mask)
    context_k[1, 3:], context_v[1, 3:] = 50.0, -50.0
    chex.assert_trees_all_equal(attend(q, k, v, causal_mask(6), context_k, context_v, mask), out)


def test_a_row_with_nothing_to_attend_is_finite() -> None:
    q, k, v = own(4)
    assert np.isfinite(np.asarray(attend(q, k, v, jnp.zeros((4, 4), bool)))).all()
