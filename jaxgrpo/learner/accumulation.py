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

from jaxgrpo.models.lora import combine
from jaxgrpo.models.qwen2 import Layer, Params

Carry = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def accumulating_scan(
    layer: Layer, carry: Carry, stack: Params, accumulator: Params, frozen: Params | None = None
) -> Carry:
    """`carry` through `layer(carry, leaves)` for each row of the stack (leaves [L, ...]), the rows of the `frozen` stack put beside its own
    (`jaxgrpo.models.lora.combine`). The gradient with regard to `stack` is `accumulator` (same shapes) plus the stack's
    own; `frozen` has none.

    What a layer keeps for its backward pass is the layer's own matter (`jaxgrpo.models.qwen2.rematerialised`), except
    that neither stack is kept
    twice. `layer` may close over arrays with regard to which nothing is differentiated.
    """
    return jax.lax.scan(lambda c, rows: (layer(c, combine(*rows)), None), carry, (stack, frozen))[0]


_Stacks = tuple[Params, Params | None]


def _forward(
    layer: Layer, carry: Carry, stack: Params, accumulator: Params, frozen: Params | None
) -> tuple[Carry, tuple[Partial, list, _Stacks, Params]]:
    rebuild = None

    def one(carry: Carry, rows: _Stacks) -> tuple[Carry, list[jax.Array]]:
        nonlocal rebuild
        out, pull = jax.vjp(lambda c, leaves: layer(c, combine(leaves, rows[1])), carry, rows[0])
        kept, tree = jax.tree.flatten(pull)
        own = [id(leaf) for leaf in jax.tree.leaves(rows)]
        place = [own.index(id(x)) if id(x) in own else None for x in kept]
        rebuild = Partial(functools.partial(_pull_back, tree, place))
        return out, [x for x, at in zip(kept, place, strict=True) if at is None]

    out, kept = jax.lax.scan(one, carry, (stack, frozen))
    assert rebuild is not None
    return out, (rebuild, kept, (stack, frozen), accumulator)


def _pull_back(tree: Any, place: list[int | None], kept: list[jax.Array], rows: _Stacks) -> Any:
    """A layer's backward pass, out of what it kept and of its rows of the stacks."""
    others, own = iter(kept), jax.tree.leaves(rows)
    return jax.tree.unflatten(tree, [next(others) if at is None else own[at] for at in place])


def _backward(
    layer: Layer, residuals: tuple[Partial, list, _Stacks, Params], cotangent: Carry
) -> tuple[Carry, Params, None, None]:
    rebuild, kept, stacks, accumulator = residuals

    def one(
        state: tuple[Carry, Params], row: tuple[jax.Array, list, _Stacks]
    ) -> tuple[tuple[Carry, Params], None]:
        (cotangent, total), (index, kept, rows) = state, row
        cotangent, gradient = rebuild(kept, rows)(cotangent)
        return (cotangent, jax.tree.map(lambda t, g: t.at[index].add(g), total, gradient)), None

    rows = (jnp.arange(jax.tree.leaves(stacks)[0].shape[0]), kept, stacks)
    (cotangent, total), _ = jax.lax.scan(one, (cotangent, accumulator), rows, reverse=True)
    return cotangent, total, None, None


accumulating_scan.defvjp(_forward, _backward)
