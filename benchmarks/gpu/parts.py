"""Define the parts in their order: code, share of the time, and units."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the program. `module.run(unit, context)` runs each unit in its own process.

    A part gets its `share` of the time that is left, relative to the shares of it and all later
    parts. A unit gets at most two thirds of what its part has left. Both get at least `floor`
    seconds: the time to start, to compile and to write the first figures. No unit is started with
    less.
    """

    name: str
    module: str
    share: float
    units: tuple[str, ...]
    tiny_units: tuple[str, ...] = ()
    floor: float = 5.0


_UPDATES = (
    "1.5B cudnn attention",
    "0.5B xla attention",
    "0.5B cudnn attention",
    "7B cudnn attention",
    "7B cudnn full",
    "0.5B cudnn none",
    "plan",
    "7B xla attention",
    "0.5B cudnn full",
    "1.5B cudnn full",
)
_TINY_UPDATES = ("tiny cudnn attention", "tiny xla attention", "tiny xla none", "plan")
_TESTS = (
    "models/test_attention",
    "samplers/native/test_decode",
    "models/test_numerics",
    "learner/test_update",
    "learner/test_losses",
    "learner/test_token_logprobs",
    "learner/test_optimizer",
    "samplers/native/test_sampler",
    "models/test_qwen2",
    "learner/test_accumulation",
    "models/test_cudnn",
)

_GPU = "benchmarks.gpu."

PARTS = (
    Part("device", _GPU + "device", 1, ("versions",), floor=8),
    Part("attention", _GPU + "attention", 15, ("agreement", "speed"), floor=30),
    Part("peak", _GPU + "peak", 5, ("products",), floor=25),
    Part("torch", _GPU + "torch_part", 15, ("0.5B", "1.5B"), ("tiny",), floor=50),
    Part("sampler", _GPU + "sampling", 20, ("0.5B", "7B"), ("tiny",), floor=60),
    Part("demo", _GPU + "demo", 14, ("demo",), floor=60),
    Part("mfu", _GPU + "mfu", 25, _UPDATES, _TINY_UPDATES, floor=60),
    Part("model", _GPU + "whole_model", 11, ("batched groups",), floor=60),
    Part("publishing", _GPU + "publishing", 6, ("0.5B", "7B"), ("tiny",), floor=25),
    Part("tests", _GPU + "checks", 4, _TESTS, ("models/test_numerics",), floor=20),
)
