"""The parts in their order: where their code is, their share of the time, their units."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """Each unit is run by `module.run(unit, context)` in a process of its own. A part gets `share`
    of the time over those of all parts from it on; its units each at most half of what the part has
    left."""

    name: str
    module: str
    share: float
    units: tuple[str, ...]
    tiny_units: tuple[str, ...] = ()


_ATTENTION = (
    "7B heads",
    "through a model",
    "0.5B heads",
    "7B heads, speed",
    "0.5B heads, speed",
)
_TINY_ATTENTION = ("tiny heads", "through a model", "tiny heads, speed")
_UPDATES = (
    "0.5B cudnn attention",
    "7B cudnn attention",
    "1.5B cudnn attention",
    "7B cudnn full",
    "0.5B cudnn none",
    "plan",
    "0.5B xla attention",
    "7B xla attention",
    "0.5B cudnn full",
    "1.5B cudnn full",
)
_TINY_UPDATES = ("tiny cudnn attention", "tiny xla attention", "tiny xla none", "plan")
_TESTS = (
    "test_attention",
    "test_decode",
    "test_numerics",
    "test_update",
    "test_losses",
    "test_token_logprobs",
    "test_optimizer",
    "test_native_sampler",
    "test_model",
    "test_accumulation",
    "test_cudnn",
)

PARTS = (
    Part("device", "benchmarks.gpu.device", 6, ("versions",)),
    Part("attention", "benchmarks.gpu.attention", 14, _ATTENTION, _TINY_ATTENTION),
    Part("peak", "benchmarks.gpu.peak", 4, ("products",)),
    Part("mfu", "benchmarks.gpu.mfu", 36, _UPDATES, _TINY_UPDATES),
    Part("torch", "benchmarks.gpu.torch_part", 9, ("0.5B", "1.5B"), ("tiny",)),
    Part("sampler", "benchmarks.gpu.sampling", 18, ("0.5B", "7B"), ("tiny",)),
    Part("publishing", "benchmarks.gpu.publishing", 7, ("0.5B", "7B"), ("tiny",)),
    Part("demo", "benchmarks.gpu.demo", 11, ("demo",)),
    Part("tests", "benchmarks.gpu.checks", 4, _TESTS, ("test_numerics",)),
)
