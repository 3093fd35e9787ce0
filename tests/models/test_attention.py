"""Rotary positions and attention, against direct float64 implementations and the gradient of a dense softmax; blocks of queries, a shared
context in two parts."""

import functools
import math
import re
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.models import attention
from jaxgrpo.models.attention import XLA, apply_rope, attend
from tests import reference

N, G, H, K, SIZE = 2, 3, 4, 2, 8


def heads(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, SIZE)).astype(np.float32)


def own(t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [N, G, T, H, h], keys and values [N, G, T, K, h]."""
    return heads(0, N, G, t, H), heads(1, N, G, t, K), heads(2, N, G, t, K)


def context(p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values [N, P, K, h], and lengths [N] that leave the second group a shorter context."""
    return heads(3, N, p, K), heads(4, N, p, K), np.array([p, p - 2])


def dense(q: jax.Array, k: jax.Array, v: jax.Array, *shared: jax.Array) -> jax.Array:
    """The same attention as one softmax over concatenated keys, its gradient left to autodiff."""
    n, g, t, h, size = q.shape
    mask = jnp.broadcast_to(jnp.tri(t, dtype=bool), (n, g, t, t))
    if shared:
        context_k, context_v, lengths = shared
        p = context_k.shape[1]
        k, v = (
            jnp.concatenate([jnp.broadcast_to(c[:, None], (n, g, p, K, SIZE)), own], 2)
            for c, own in ((context_k, k), (context_v, v))
        )
        seen = jnp.broadcast_to(
            (jnp.arange(p) < jnp.asarray(lengths)[:, None])[:, None, None], (n, g, t, p)
        )
        mask = jnp.concatenate([seen, mask], -1)
    k, v = (jnp.repeat(x, h // K, axis=3) for x in (k, v))
    scores = jnp.where(
        mask[:, :, None], jnp.einsum("ngthx,ngshx->nghts", q, k) / size**0.5, -jnp.inf
    )
    return jnp.einsum("nghts,ngshx->ngthx", jax.nn.softmax(scores), v)


def value_and_gradients(
    function: Callable[..., jax.Array], arrays: tuple, *rest: np.ndarray
) -> tuple:
    """The output, and the gradients by all `arrays` of its products with fixed random weights."""

    def loss(*a: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*a, *rest)
        return jnp.sum(out * heads(6, *out.shape[:-1])), out

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def test_rope_equals_a_turn_of_complex_numbers() -> None:
    x, positions = heads(0, 5, H), np.array([0, 1, 2, 77, 4000])
    expected = reference.rope(x, positions, 1e6)
    chex.assert_trees_all_close(
        np.asarray(apply_rope(x, jnp.asarray(positions), 1e6)),
        expected.astype(np.float32),
        atol=1e-4,
    )


def test_rope_by_hand() -> None:
    # one pair, a quarter turn a position: (1, 0) at position 1 with theta such that the angle is 1 radian
    turned = apply_rope(jnp.array([[[1.0, 0.0]]]), jnp.array([1]), 10000.0)
    chex.assert_trees_all_close(
        turned, jnp.array([[[0.5403023, 0.8414710]]]), rtol=1e-6
    )  # cos 1, sin 1


def test_rope_keeps_the_dtype() -> None:
    assert apply_rope(jnp.ones((3, 1, 8), jnp.bfloat16), jnp.arange(3), 1e6).dtype == jnp.bfloat16


def test_attention_equals_float64_numpy() -> None:
    q, k, v = own(6)
    out = attend(XLA, q, k, v)
    expected = np.stack(
        [
            [
                reference.attention(q[n, g], k[n, g], v[n, g], np.tri(6, dtype=bool))
                for g in range(G)
            ]
            for n in range(N)
        ]
    )
    chex.assert_trees_all_close(np.asarray(out), expected.astype(np.float32), atol=1e-6)


def test_a_context_equals_its_keys_put_before_the_rows_own() -> None:
    (q, k, v), (context_k, context_v, lengths) = own(6), context(5)
    out = attend(XLA, q, k, v, context_k, context_v, lengths)
    expected = np.zeros(q.shape)
    for n in range(N):
        for g in range(G):
            whole_mask = np.concatenate(
                [np.broadcast_to(np.arange(5) < lengths[n], (6, 5)), np.tri(6, dtype=bool)], axis=1
            )
            keys, values = (
                np.concatenate([context_k[n], k[n, g]]),
                np.concatenate([context_v[n], v[n, g]]),
            )
            expected[n, g] = reference.attention(q[n, g], keys, values, whole_mask)
    chex.assert_trees_all_close(np.asarray(out), expected.astype(np.float32), atol=1e-6)


def test_a_long_row_equals_float64_numpy() -> None:
    t = 530
    assert t > 2 * attention._QUERY_BLOCK and t % attention._QUERY_BLOCK != 0
    q, k, v = (x[:1, :1] for x in own(t))
    out = attend(XLA, q, k, v)
    expected = reference.attention(q[0, 0], k[0, 0], v[0, 0], np.tri(t, dtype=bool))
    chex.assert_trees_all_close(np.asarray(out)[0, 0], expected.astype(np.float32), atol=2e-6)


@pytest.mark.parametrize(
    "block", [256, 4, 3, 1]
)  # one block; blocks that fill the row or do not; more blocks than segments
def test_value_and_gradients_equal_those_of_a_dense_softmax(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    arrays = own(10)
    chex.assert_trees_all_close(
        value_and_gradients(functools.partial(attend, XLA), arrays),
        value_and_gradients(dense, arrays),
        atol=2e-6,
    )


@pytest.mark.parametrize("block", [256, 8, 7])
def test_the_gradient_of_two_merged_parts_is_that_of_one_softmax(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    context_k, context_v, lengths = context(5)
    arrays = (*own(10), context_k, context_v)
    ours = value_and_gradients(functools.partial(attend, XLA), arrays, lengths)
    chex.assert_trees_all_close(ours, value_and_gradients(dense, arrays, lengths), atol=2e-6)


def test_in_bfloat16_the_gradients_are_near_the_dense_ones() -> None:
    context_k, context_v, lengths = context(5)
    arrays = (*own(10), context_k, context_v)
    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    ours = value_and_gradients(functools.partial(attend, XLA), rounded, lengths)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(ours))
    exact = value_and_gradients(dense, tuple(x.astype(jnp.float32) for x in rounded), lengths)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert jnp.linalg.norm(got.astype(jnp.float32) - expected) < 0.01 * jnp.linalg.norm(
            expected
        )


def test_what_lies_behind_a_context_does_not_matter() -> None:
    (q, k, v), (context_k, context_v, lengths) = own(6), context(5)
    out = attend(XLA, q, k, v, context_k, context_v, lengths)
    context_k[1, 3:], context_v[1, 3:] = 50.0, -50.0
    chex.assert_trees_all_equal(attend(XLA, q, k, v, context_k, context_v, lengths), out)


def test_an_empty_context_changes_nothing() -> None:
    (q, k, v), (context_k, context_v, _) = own(6), context(5)
    empty = np.zeros(N, int)
    chex.assert_trees_all_close(
        attend(XLA, q, k, v, context_k, context_v, empty), attend(XLA, q, k, v), atol=1e-7
    )
    gradients, _ = value_and_gradients(
        functools.partial(attend, XLA), (q, k, v, context_k, context_v), empty
    )
    chex.assert_trees_all_equal(gradients[3:], (np.zeros_like(context_k), np.zeros_like(context_v)))


def test_the_context_is_never_copied_for_the_rows() -> None:
    """No array of the program, gradient included, is as large as the context's keys once a row."""
    (q, k, v), (context_k, context_v, lengths) = own(6), context(5)
    text = (
        jax.jit(jax.grad(lambda *a: attend(XLA, *a, lengths).sum(), argnums=(0, 3, 4)))
        .lower(q, k, v, context_k, context_v)
        .as_text()
    )
    copied = N * G * 5 * K * SIZE
    sizes = [
        math.prod(map(int, shape.split("x"))) for shape in re.findall(r"tensor<([\dx]+)xf32>", text)
    ]
    assert copied not in sizes
    assert N * 5 * K * SIZE in sizes
