"""Products of low-precision operands."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.models.numerics import matmul


def assert_rounded_once(product: jax.Array, exact: np.ndarray) -> None:
    off = np.abs(np.asarray(product, np.float64) - exact)
    assert (off <= np.abs(exact) * 2**-8 + 1e-4).all()  # half a unit in the last of 8 bits


def test_a_product_of_bfloat16_is_summed_in_float32_and_rounded_once():
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 3, 500), (500, 7))
    )
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    product = jax.jit(matmul)(x, kernel)
    assert product.dtype == jnp.bfloat16
    assert_rounded_once(product, exact)


def test_its_gradient_is_that_of_the_product():
    rng = np.random.default_rng(1)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4, 32), (32, 6)))
    weights = rng.normal(size=(4, 6)).astype(np.float32)
    d_x, d_kernel = jax.grad(
        lambda a, b: (matmul(a, b).astype(jnp.float32) * weights).sum(), (0, 1)
    )(x, kernel)
    assert d_x.dtype == d_kernel.dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(weights, jnp.bfloat16), np.float64)
    assert_rounded_once(d_x, rounded @ np.asarray(kernel, np.float64).T)
    assert_rounded_once(d_kernel, np.asarray(x, np.float64).T @ rounded)


def test_float32_is_left_alone():
    x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    assert str(jax.make_jaxpr(matmul)(x, kernel)) == str(
        jax.make_jaxpr(lambda a, b: a @ b)(x, kernel)
    )
