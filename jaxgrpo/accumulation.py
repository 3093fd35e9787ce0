"""A stack of layers whose gradient is added to an accumulator in place.

Under autodiff's own rule the backward loop writes the gradient of the whole stack as a new array, which is then added to the accumulator
of the micro-batches before: a second copy of all gradients, the largest temporary of the update. Here the backward loop carries the
accumulator and adds each layer's gradient to its row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxgrpo.model import Layer, Params

Carry = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def accumulating_scan(layer: Layer, carry: Carry, stack: Params, accumulator: Params) -> Carry:
    """`carry` through `layer(carry, leaves)` for each row of the stack (leaves [L, ...]). The gradient with regard to `stack` is
    `accumulator` (same shapes) plus the stack's own.

    What a layer keeps for its backward pass is the layer's own matter (`jaxgrpo.model.rematerialised`), except that the stack is not kept
    twice. `layer` may close over arrays with regard to which nothing is differentiated.
    """
    return jax.lax.scan(lambda c, leaves: (layer(c, leaves), None), carry, stack)[0]


def _forward(layer: Layer, carry: Carry, stack: Params, accumulator: Params) -> tuple[Carry, tuple[Partial, list, Params, Params]]:
    rebuild = None

    def one(carry: Carry, leaves: Params) -> tuple[Carry, list[jax.Array]]:
        nonlocal rebuild
        out, pull = jax.vjp(layer, carry, leaves)
        kept, tree = jax.tree.flatten(pull)
        own = [id(leaf) for leaf in jax.tree.leaves(leaves)]
        place = [own.index(id(x)) if id(x) in own else None for x in kept]
        rebuild = Partial(functools.partial(_pull_back, tree, place))
        return out, [x for x, at in zip(kept, place, strict=True) if at is None]

    out, kept = jax.lax.scan(one, carry, stack)
    assert rebuild is not None
    return out, (rebuild, kept, stack, accumulator)


def _pull_back(tree: Any, place: list[int | None], kept: list[jax.Array], leaves: Params) -> Any:
    """A layer's backward pass, out of what it kept and of its row of the stack."""
    others, own = iter(kept), jax.tree.leaves(leaves)
    return jax.tree.unflatten(tree, [next(others) if at is None else own[at] for at in place])


def _backward(layer: Layer, residuals: tuple[Partial, list, Params, Params], cotangent: Carry) -> tuple[Carry, Params, None]:
    rebuild, kept, stack, accumulator = residuals

    def one(state: tuple[Carry, Params], row: tuple[jax.Array, list, Params]) -> tuple[tuple[Carry, Params], None]:
        (cotangent, total), (index, kept, leaves) = state, row
        cotangent, gradient = rebuild(kept, leaves)(cotangent)
        return (cotangent, jax.tree.map(lambda t, g: t.at[index].add(g), total, gradient)), None

    rows = (jnp.arange(jax.tree.leaves(stack)[0].shape[0]), kept, stack)
    (cotangent, total), _ = jax.lax.scan(one, (cotangent, accumulator), rows, reverse=True)
    return cotangent, total, None


accumulating_scan.defvjp(_forward, _backward)
