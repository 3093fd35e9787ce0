"""Matrix products of low-precision operands that are fast and accurate on every backend."""

import jax
import jax.numpy as jnp
from jax import Array


def einsum_float32(axes: str, a: Array, b: Array) -> Array:
    """`jnp.einsum(axes, a, b)`, summed and returned in float32.

    XLA's CPU backend (jax 0.12) has no kernel for some products of bfloat16 with a float32 result.
    There the operands are cast first, which is exact. The choice is made for the platform that the
    program is lowered to.
    """
    if a.dtype == b.dtype == jnp.float32:
        return jnp.einsum(axes, a, b)
    total: Array = jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda x, y: jnp.einsum(axes, x.astype(jnp.float32), y.astype(jnp.float32)),
        default=lambda x, y: jnp.einsum(axes, x, y, preferred_element_type=jnp.float32),
    )
    return total


def matmul(x: Array, kernel: Array) -> Array:
    """x [..., in] @ kernel [in, out], in the operands' dtype.

    XLA's CPU backend has a fast kernel for products of bfloat16 only if the result is float32.
    There the result is rounded afterwards. The plain product rounds as well, at a tenth of the
    speed.
    """
    if x.dtype == kernel.dtype == jnp.float32:
        return x @ kernel
    product: Array = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype),
        default=jnp.matmul,
    )
    return product
