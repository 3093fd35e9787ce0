"""LoRA (arXiv:2106.09685): the adapter of a linear layer, and the trees of adapters.

An adapted linear layer computes x W + (alpha / r) (x A) B (eq. 3), with W frozen, and A [in, r] and
B [r, out] trained. In the logical tree, the adapter of a linear layer is beside its kernel. A is
stored transposed, as [r, in], because its gradient is then several times cheaper on a CPU.

    layers/attention/q/kernel [L, D, H*h]      frozen
    layers/attention/q/adapter/a [L, r, D]     trained; initially uniform within 1 / sqrt(D)
    layers/attention/q/adapter/b [L, r, H*h]   trained; initially zero, so the model is its base
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgrpo.config.settings import LoraSettings

ADAPTER = "adapter"


class Adapter(nnx.Module):
    """x [..., in] -> scale * (x @ a.T) @ b, with a [r, in] and b [r, out].

    Initially, b is zero and a is uniform within 1 / sqrt(in), as in PEFT.
    """

    def __init__(self, in_size: int, out_size: int, lora: LoraSettings, *, rngs: nnx.Rngs):
        bound = in_size**-0.5
        self.a = nnx.Param(
            jax.random.uniform(rngs.params(), (lora.rank, in_size), minval=-bound, maxval=bound)
        )
        self.b = nnx.Param(jnp.zeros((lora.rank, out_size)))
        self.scale = lora.scale

    def __call__(self, x: Array) -> Array:
        return self.scale * (x @ self.a[...].T) @ self.b[...]


def combine(params: Any, frozen: Any | None) -> Any:
    """Merge trained and frozen leaves into the tree that the forward pass reads."""
    if frozen is None:
        return params
    together = dict(frozen)
    for key, value in params.items():
        together[key] = combine(value, frozen[key]) if key in frozen else value
    return together


def only_adapters(tree: Any) -> Any:
    """Return the adapters of a tree, under their paths."""
    inner = {
        key: value if key == ADAPTER else only_adapters(value)
        for key, value in tree.items()
        if isinstance(value, dict)
    }
    return {key: value for key, value in inner.items() if value}
