"""Low-rank adaptation (LoRA, arXiv:2106.09685): the settings, and the trees of adapters and of frozen weights. Pure.

An adapted linear layer computes x W + (alpha / r) (x A) B (eq. 3) with W frozen, A [in, r] and B [r, out] trained. In the logical tree the
adapter of a linear layer lies beside its kernel, with the layer axis L in front as everywhere, and A transposed: as rows of [r, in] its
gradient is several times cheaper on a CPU.

    layers/attention/q/kernel [L, D, H*h]        frozen
    layers/attention/q/adapter/a [L, r, D]       trained, uniform within 1 / sqrt(D) at first, as PEFT has it
    layers/attention/q/adapter/b [L, r, H*h]     trained, zero at first: an adapted model begins as its base
"""

import dataclasses
from typing import Any

from jaxgrpo.overrides import leaves

ADAPTER = "adapter"
TARGETS = {
    "q": ("attention", "q"),
    "k": ("attention", "k"),
    "v": ("attention", "v"),
    "o": ("attention", "o"),
    "gate": ("mlp", "gate"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}
"""The linear layers that can be adapted: where each is within a decoder layer."""
EXPORTS = ("merged", "adapter")


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """`rank` 0 is no LoRA: all weights are trained. Otherwise only the adapters of the linear layers `targets` are, scaled by `alpha` /
    `rank`. There is no dropout: it would make the policy that is trained another one than the policy that sampled. `export` "merged"
    writes the trained policy as a whole model, "adapter" as a PEFT adapter of its base."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(TARGETS)
    export: str = "merged"

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def of(self, target: str) -> "LoraSettings | None":
        """The settings of one linear layer's adapter, None when it has none."""
        return self if self.rank and target in self.targets else None


NO_LORA = LoraSettings()


def contradictions(lora: LoraSettings) -> list[str]:
    """What of the settings cannot be together: lines to show."""
    problems = []
    defaults = {key: value for key, value, _ in leaves(NO_LORA)}
    if not lora.rank:
        idle = [key for key, value, _ in leaves(lora) if value != defaults[key]]
        problems += [f"lora.{key} has no effect when lora.rank is 0, which trains all weights: set lora.rank too" for key in idle]
    if not lora.targets:
        problems.append(f"lora.targets is empty, so nothing would be trained: name some of {', '.join(TARGETS)}")
    if len(set(lora.targets)) < len(lora.targets):
        problems.append(f"lora.targets names a layer twice: {', '.join(lora.targets)}")
    return problems


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
    inner = {key: value if key == ADAPTER else only_adapters(value) for key, value in tree.items() if isinstance(value, dict)}
    return {key: value for key, value in inner.items() if value}
