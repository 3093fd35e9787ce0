"""The stack whose gradient is added to an accumulator: the same gradients as under autodiff's own rule, and no second copy of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxgrpo.config.settings import REMAT
from jaxgrpo.learner.accumulation import accumulating_scan
from jaxgrpo.models.qwen2 import Params, rematerialised, scan_stack

LAYERS, WIDTH, ROWS = 48, 32, 4
Gradients = tuple[Params, Array]


def layer(carry: tuple[Array, Array], leaves: Params) -> tuple[Array, Array]:
    """Two streams, as in the model, of which the second reads the first."""
    first, second = carry
    return jnp.tanh(first @ leaves["w"] + leaves["b"]), second + jnp.tanh(
        (first + second) @ leaves["w"]
    )


def arrays() -> tuple[Params, Params, Array]:
    """The stack, the accumulator, the input."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32)
    tree = lambda: {"w": normal(LAYERS, WIDTH, WIDTH), "b": normal(LAYERS, WIDTH)}
    return tree(), tree(), normal(ROWS, WIDTH)


def accumulated(stack: Params, accumulator: Params, x: Array, remat: str = "full") -> Gradients:
    def loss(stack: Params, x: Array) -> Array:
        return jnp.sum(
            accumulating_scan(rematerialised(layer, remat), (x, 2 * x), stack, accumulator)[1] ** 2
        )

    return jax.grad(loss, (0, 1))(stack, x)


def added(stack: Params, accumulator: Params, x: Array) -> Gradients:
    def loss(stack: Params, x: Array) -> Array:
        return jnp.sum(scan_stack(rematerialised(layer, "full"), (x, 2 * x), stack)[1] ** 2)

    gradient, dx = jax.grad(loss, (0, 1))(stack, x)
    return jax.tree.map(jnp.add, accumulator, gradient), dx


def assert_close(ours: Array, expected: Array) -> None:
    """Within 2e-6 of the largest number."""
    np.testing.assert_allclose(
        ours, expected, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(expected)))
    )


@pytest.mark.parametrize("remat", REMAT)
def test_the_stacks_gradient_is_added_and_the_inputs_is_not(remat: str) -> None:
    (got, dx), (expected, expected_dx) = accumulated(*arrays(), remat), added(*arrays())
    for name in ("w", "b"):
        assert_close(got[name], expected[name])
    assert_close(dx, expected_dx)
    assert float(jnp.max(jnp.abs(dx))) > 0.1


@pytest.mark.parametrize(("gradients", "copies"), [(accumulated, 0), (added, 1)])
def test_no_second_copy_of_all_gradients_is_made(
    gradients: Callable[..., Gradients], copies: int
) -> None:
    given = arrays()
    memory = jax.jit(gradients, donate_argnums=1).lower(*given).compile().memory_analysis()
    stack_bytes = 4 * LAYERS * (WIDTH * WIDTH + WIDTH)
    rest = 4 * LAYERS * ROWS * WIDTH * 6  # carries between layers, and what a layer computes
    assert copies * stack_bytes <= memory.temp_size_in_bytes < copies * stack_bytes + rest


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_the_forward_loop_keeps_carries_and_not_the_stack_again(remat: str) -> None:
    """In the traced program: XLA's CPU backend takes a second copy out by itself."""
    traced = jax.make_jaxpr(lambda *given: accumulated(*given, remat))(*arrays())
    forward, backward = (
        equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan"
    )
    assert [out.aval.shape for out in forward.outvars] == [(ROWS, WIDTH)] * 2 + [
        (LAYERS, ROWS, WIDTH)
    ] * 2
    assert [out.aval.shape for out in backward.outvars] == [(ROWS, WIDTH)] * 2 + [
        (LAYERS, WIDTH),
        (LAYERS, WIDTH, WIDTH),
    ]


def test_a_frozen_stack_is_computed_with_and_gets_no_gradient() -> None:
    stack, accumulator, x = arrays()

    def loss(stack: Params, x: Array) -> Array:
        return jnp.sum(
            accumulating_scan(
                layer, (x, 2 * x), {"b": stack["b"]}, {"b": accumulator["b"]}, {"w": stack["w"]}
            )[1]
            ** 2
        )

    (expected, expected_dx), (got, dx) = (
        accumulated(stack, accumulator, x),
        jax.grad(loss, (0, 1))(stack, x),
    )
    assert_close(got["b"], expected["b"])
    assert_close(dx, expected_dx)
    assert not jnp.any(got["w"])
