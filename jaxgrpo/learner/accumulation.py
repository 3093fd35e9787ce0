"""A scan over layers whose gradient is added to an accumulator in place.

With autodiff, the backward loop writes the gradient of the whole stack to a new array, which is
then added to the accumulator. This second copy of all gradients would be the largest temporary of
the update. Here the backward loop carries the accumulator and adds each layer's gradient to its
row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxgrpo.models.lora import combine
from jaxgrpo.models.qwen2 import Layer, Params

Carry = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def accumulating_scan(
    layer: Layer, carry: Carry, stack: Params, accumulator: Params, frozen: Params | None = None
) -> Carry:
    """Pass `carry` through `layer(carry, leaves)` for each row of the stack (leaves [L, ...]).

    `leaves` are a row of `stack`, merged with the row of `frozen` (`jaxgrpo.models.lora.combine`).
    The gradient with respect to `stack` is `accumulator` (same shapes) plus the stack's own. There
    is none for `frozen`, nor for arrays that `layer` closes over.

    The layer decides what to save for its backward pass (`jaxgrpo.models.qwen2.rematerialized`),
    but neither stack is ever saved a second time.
    """
    return jax.lax.scan(lambda c, rows: (layer(c, combine(*rows)), None), carry, (stack, frozen))[0]


_Stacks = tuple[Params, Params | None]


def _forward(
    layer: Layer, carry: Carry, stack: Params, accumulator: Params, frozen: Params | None
) -> tuple[Carry, tuple[Partial, list[Any], _Stacks, Params]]:
    rebuild = None

    def one(carry: Carry, rows: _Stacks) -> tuple[Carry, list[jax.Array]]:
        nonlocal rebuild
        out, pull = jax.vjp(lambda c, leaves: layer(c, combine(leaves, rows[1])), carry, rows[0])
        kept, tree = jax.tree.flatten(pull)
        # Residuals that are rows of the stacks are recognized by identity (they are the same
        # tracers) and left out. The scan would otherwise save a second copy of both stacks.
        own = [id(leaf) for leaf in jax.tree.leaves(rows)]
        place = [own.index(id(x)) if id(x) in own else None for x in kept]
        rebuild = Partial(functools.partial(_pull_back, tree, place))
        return out, [x for x, at in zip(kept, place, strict=True) if at is None]

    out, kept = jax.lax.scan(one, carry, (stack, frozen))
    assert rebuild is not None
    return out, (rebuild, kept, (stack, frozen), accumulator)


def _pull_back(tree: Any, place: list[int | None], kept: list[jax.Array], rows: _Stacks) -> Any:
    """Rebuild the backward pass of a layer from its residuals and its rows of the stacks."""
    others, own = iter(kept), jax.tree.leaves(rows)
    return jax.tree.unflatten(tree, [next(others) if at is None else own[at] for at in place])


def _backward(
    layer: Layer, residuals: tuple[Partial, list[Any], _Stacks, Params], cotangent: Carry
) -> tuple[Carry, Params, None, None]:
    rebuild, kept, stacks, accumulator = residuals

    def one(
        state: tuple[Carry, Params], row: tuple[jax.Array, list[Any], _Stacks]
    ) -> tuple[tuple[Carry, Params], None]:
        (cotangent, total), (index, kept, rows) = state, row
        cotangent, gradient = rebuild(kept, rows)(cotangent)
        return (cotangent, jax.tree.map(lambda t, g: t.at[index].add(g), total, gradient)), None

    rows = (jnp.arange(jax.tree.leaves(stacks)[0].shape[0]), kept, stacks)
    (cotangent, total), _ = jax.lax.scan(one, (cotangent, accumulator), rows, reverse=True)
    return cotangent, total, None, None


accumulating_scan.defvjp(_forward, _backward)
