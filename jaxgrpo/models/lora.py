"""Low-rank adaptation (LoRA, arXiv:2106.09685): the trees of adapters and of frozen weights. Pure.

An adapted linear layer computes x W + (alpha / r) (x A) B (eq. 3), with W frozen, and A [in, r] and
B [r, out] trained. In the logical tree, the adapter of a linear layer is beside its kernel. A is
stored transposed, as [r, in], because its gradient is then several times cheaper on a CPU.

    layers/attention/q/kernel [L, D, H*h]      frozen
    layers/attention/q/adapter/a [L, r, D]     trained; initially uniform within 1 / sqrt(D)
    layers/attention/q/adapter/b [L, r, H*h]   trained; initially zero, so the model is its base
"""

from typing import Any

ADAPTER = "adapter"


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
