"""Token log-probabilities and entropies by the chunked head: values and gradients, against literals and float64 NumPy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.learner.losses import Head, token_logprobs
from jaxgrpo.learner.sharding import Replicated
from tests import reference

with_and_without_jit = pytest.mark.parametrize(
    "transform", [jax.jit, lambda function: function], ids=["jit", "no jit"]
)
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]
LOG3 = math.log(3)
T, D, V = 11, 5, 17


def logprob_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden, table, cotangents = rng.normal(size=(T, D)), rng.normal(size=(V, D)), rng.normal(size=T)
    return (
        hidden.astype(np.float32),
        table.astype(np.float32),
        rng.integers(0, V, T),
        cotangents.astype(np.float32),
    )


def head(
    chunk: int, temperature: float = 1.0, dtype: Any = jnp.float32, shape: tuple[int, int] = (V, D)
) -> Head:
    return Head(shape, Replicated(dtype), chunk, temperature)


def logprobs_and_gradients(
    hidden: Any,
    table: Any,
    targets: Any,
    cotangents: Any,
    spec: Head,
    transform: Transform = jax.jit,
) -> tuple:
    def run(h: jax.Array, w: jax.Array) -> tuple:
        (logprobs, entropies), pullback = jax.vjp(
            lambda a, b: token_logprobs(a, b, targets, spec), h, w
        )
        return logprobs, entropies, *pullback((jnp.asarray(cotangents), jnp.zeros_like(entropies)))

    return transform(run)(jnp.asarray(hidden), jnp.asarray(table))


@with_and_without_jit
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_chunked_logprobs_equal_float64_numpy(
    chunk: int, temperature: float, transform: Transform
) -> None:
    case = logprob_case()
    expected = reference.token_logprobs(*case, temperature)
    got = logprobs_and_gradients(*case, head(chunk, temperature), transform)
    chex.assert_trees_all_close(
        tuple(map(np.asarray, got)),
        tuple(x.astype(np.float32) for x in expected),
        rtol=2e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("chunk", [1, 3, 4, 10])
def test_chunked_equals_unchunked_log_softmax_and_its_gradient(chunk: int) -> None:
    hidden, table, targets, cotangents = logprob_case(1)

    def dense(h: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(h @ w.T / 0.6), targets[:, None], axis=1)[
            :, 0
        ]

    expected, pullback = jax.vjp(dense, jnp.asarray(hidden), jnp.asarray(table))
    got, _, *gradients = logprobs_and_gradients(
        hidden, table, targets, cotangents, head(chunk, 0.6)
    )
    chex.assert_trees_all_close(
        (got, *gradients), (expected, *pullback(jnp.asarray(cotangents))), rtol=2e-5, atol=2e-6
    )


def test_temperature_changes_the_logprobs() -> None:
    # logits 2 and 0: at temperature 1, log(e^2 / (e^2 + 1)) = -.126928; at temperature 2, log(e / (e + 1)) = -.313262
    args = (jnp.array([[2.0]]), jnp.array([[1.0], [0.0]]), jnp.array([0]))
    values = [float(token_logprobs(*args, head(4, t, shape=(2, 1)))[0][0]) for t in (1.0, 2.0)]
    assert values == pytest.approx([-0.126928, -0.313262], abs=1e-6)


def test_large_logits_do_not_overflow() -> None:
    # logits 500, 499 and -500: 1 / (1 + 1/e) = .7310586, of which the entropy is .5822031
    table = jnp.array([[500.0], [499.0], [-500.0]])
    logprobs, entropies = token_logprobs(
        jnp.ones((2, 1)), table, jnp.array([0, 2]), head(2, shape=(3, 1))
    )
    chex.assert_trees_all_close(
        logprobs, jnp.array([math.log(0.7310586), -1000 + math.log(0.7310586)]), rtol=1e-5
    )
    chex.assert_trees_all_close(entropies, jnp.full(2, 0.5822031), rtol=1e-4)


def test_a_table_that_is_not_trained_gets_no_gradient() -> None:
    case = logprob_case()
    frozen = dataclasses.replace(head(4), trained=False)
    *trained, table_gradient = logprobs_and_gradients(*case, head(4))
    *rest, nothing = logprobs_and_gradients(*case, frozen)
    chex.assert_trees_all_equal(rest, trained)
    assert np.abs(table_gradient).max() > 0.1 and not np.any(nothing)


def test_the_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary() -> None:
    _, entropies = token_logprobs(jnp.ones((3, D)), jnp.zeros((V, D)), jnp.zeros(3, int), head(2))
    chex.assert_trees_all_close(entropies, jnp.full(3, math.log(V)), rtol=1e-6)


def test_the_entropy_by_hand() -> None:
    # probabilities 3/4 and 1/4: log 4 - 3/4 log 3
    _, entropies = token_logprobs(
        jnp.array([[LOG3]]), jnp.array([[1.0], [0.0]]), jnp.array([1]), head(1, shape=(2, 1))
    )
    chex.assert_trees_all_close(entropies, jnp.array([math.log(4) - 0.75 * LOG3]), rtol=1e-6)


def test_no_gradient_flows_through_the_entropies() -> None:
    hidden, table, targets, _ = logprob_case()
    gradients = jax.grad(lambda h, w: token_logprobs(h, w, targets, head(4))[1].sum(), (0, 1))(
        jnp.asarray(hidden), jnp.asarray(table)
    )
    chex.assert_trees_all_equal(gradients, (jnp.zeros((T, D)), jnp.zeros((V, D))))


def test_the_tables_gradient_of_bfloat16_inputs_is_accumulated_in_float32() -> None:
    tokens, chunk = 4096, 16
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(1.0, 0.2, (tokens, D)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets, cotangents = rng.integers(0, 3, tokens), np.ones(tokens, np.float32)
    rounded = (np.asarray(hidden, np.float64), np.asarray(table.astype(jnp.bfloat16), np.float64))
    *_, expected = reference.token_logprobs(*rounded, targets, cotangents, 1.0)
    *_, gradient = logprobs_and_gradients(
        hidden, table, targets, cotangents, head(chunk, dtype=jnp.bfloat16)
    )
    assert gradient.dtype == jnp.float32
    error = np.max(np.abs(np.asarray(gradient) - expected)) / np.max(np.abs(expected))
    assert error < 2e-3  # 0.0008; plain autodiff, which accumulates in bfloat16, gives 0.044


def products_in_bfloat16(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of a traced program's matrix products whose results are in bfloat16, loops and branches included."""
    found = []
    for equation in jaxpr.eqns:
        if (
            equation.primitive.name == "dot_general"
            and equation.outvars[0].aval.dtype == jnp.bfloat16
        ):
            found.append(equation.outvars[0].aval.shape)
        inner = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
        )
        found += [
            shape
            for x in inner
            if isinstance(x, jax.extend.core.ClosedJaxpr)
            for shape in products_in_bfloat16(x.jaxpr)
        ]
    return found


def test_of_bfloat16_inputs_only_the_hidden_states_gradient_is_a_product_in_bfloat16() -> None:
    """Logits and the table's gradient are summed in float32. Values cannot show it on a CPU, where XLA keeps float32 in between."""
    hidden, table, targets, cotangents = logprob_case()
    run = lambda h, w: logprobs_and_gradients(
        h, w, targets, cotangents, head(4, dtype=jnp.bfloat16)
    )
    traced = jax.make_jaxpr(run)(jnp.asarray(hidden, jnp.bfloat16), table)
    assert products_in_bfloat16(traced.jaxpr) == [(4, D)]


def test_logprobs_of_bfloat16_inputs_are_float32() -> None:
    hidden, table, targets, _ = logprob_case()
    logprobs, entropies = token_logprobs(
        jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(table), targets, head(4, dtype=jnp.bfloat16)
    )
    rounded = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (hidden, table))
    expected, expected_entropies, *_ = reference.token_logprobs(*rounded, targets, np.ones(T), 1.0)
    assert logprobs.dtype == entropies.dtype == jnp.float32
    chex.assert_trees_all_close(np.asarray(logprobs), expected.astype(np.float32), rtol=2e-6)
    chex.assert_trees_all_close(
        np.asarray(entropies), expected_entropies.astype(np.float32), rtol=2e-6
    )
