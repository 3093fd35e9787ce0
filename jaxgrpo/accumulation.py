"""A stack of rematerialised layers whose gradient is added to an accumulator in place.

Under autodiff's own rule the backward loop writes the gradient of the whole stack as a new array, which is then added to the accumulator
of the micro-batches before: a second copy of all gradients, the largest temporary of the update. Here the backward loop carries the
accumulator and adds each layer's gradient to its row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrpo.model import Params

Carry = Any
Layer = Callable[[Carry, Params], Carry]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def accumulating_scan(layer: Layer, carry: Carry, stack: Params, accumulator: Params) -> Carry:
    """`carry` through `layer(carry, leaves)` for each row of the stack (leaves [L, ...]). Only the carries between layers are kept for the
    backward pass. The gradient with regard to `stack` is `accumulator` (same shapes) plus the stack's own.

    `layer` may close over arrays with regard to which nothing is differentiated.
    """
    return jax.lax.scan(lambda c, leaves: (layer(c, leaves), None), carry, stack)[0]


def _forward(layer: Layer, carry: Carry, stack: Params, accumulator: Params) -> tuple[Carry, tuple[Carry, Params, Params]]:
    out, carries = jax.lax.scan(lambda c, leaves: (layer(c, leaves), c), carry, stack)
    return out, (carries, stack, accumulator)


def _backward(layer: Layer, residuals: tuple[Carry, Params, Params], cotangent: Carry) -> tuple[Carry, Params, None]:
    carries, stack, accumulator = residuals

    def one(state: tuple[Carry, Params], row: tuple[jax.Array, Carry, Params]) -> tuple[tuple[Carry, Params], None]:
        (cotangent, total), (index, carry, leaves) = state, row
        cotangent, gradient = jax.vjp(layer, carry, leaves)[1](cotangent)
        return (cotangent, jax.tree.map(lambda t, g: t.at[index].add(g), total, gradient)), None

    rows = (jnp.arange(jax.tree.leaves(stack)[0].shape[0]), carries, stack)
    (cotangent, total), _ = jax.lax.scan(one, (cotangent, accumulator), rows, reverse=True)
    return cotangent, total, None


accumulating_scan.defvjp(_forward, _backward)
