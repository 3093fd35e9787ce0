"""Low-rank adaptation (LoRA, arXiv:2106.09685): the trees of adapters and of frozen weights. Pure.

An adapted linear layer computes x W + (alpha / r) (x A) B (eq. 3) with W frozen, A [in, r] and B [r, out] trained. In the logical tree the
adapter of a linear layer lies beside its kernel, with the layer axis L in front as everywhere, and A transposed: as rows of [r, in] its
gradient is several times cheaper on a CPU.

    layers/attention/q/kernel [L, D, H*h]        frozen
    layers/attention/q/adapter/a [L, r, D]       trained, uniform within 1 / sqrt(D) at first, as PEFT has it
    layers/attention/q/adapter/b [L, r, H*h]     trained, zero at first: an adapted model begins as its base
"""

from typing import Any

ADAPTER = "adapter"


def combine(params: Any, frozen: Any | None) -> Any:
    """The tree that holds the leaves of both: what a forward pass computes with. Without frozen weights, `params`."""
    if frozen is None:
        return params
    together = dict(frozen)
    for key, value in params.items():
        together[key] = combine(value, frozen[key]) if key in frozen else value
    return together


def only_adapters(tree: Any) -> Any:
    """The part of a tree that is trained: the adapters, under their paths."""
    inner = {
        key: value if key == ADAPTER else only_adapters(value)
        for key, value in tree.items()
        if isinstance(value, dict)
    }
    return {key: value for key, value in inner.items() if value}
