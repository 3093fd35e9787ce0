"""The parts in their order: where their code is, their share of the time, their units."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """Each unit is run by `module.run(unit, context)` in a process of its own. A part gets `share`
    of the time over those of all parts from it on, its units each at most two thirds of what the
    part has left; but both at least `floor` seconds, without which a unit is not begun: what one
    takes to start, to compile and to give its first figures."""

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

_GPU = "benchmarks.gpu."

PARTS = (
    Part("device", _GPU + "device", 1, ("versions",), floor=8),
    Part("attention", _GPU + "attention", 15, ("agreement", "speed"), floor=30),
    Part("peak", _GPU + "peak", 5, ("products",), floor=25),
    Part("torch", _GPU + "torch_part", 15, ("0.5B, 1.5B",), ("tiny",), floor=50),
    Part("sampler", _GPU + "sampling", 20, ("0.5B, 7B",), ("tiny",), floor=60),
    Part("demo", _GPU + "demo", 14, ("demo",), floor=60),
    Part("mfu", _GPU + "mfu", 25, _UPDATES, _TINY_UPDATES, floor=60),
    Part("model", _GPU + "whole_model", 11, ("packed groups",), floor=60),
    Part("publishing", _GPU + "publishing", 6, ("0.5B", "7B"), ("tiny",), floor=25),
    Part("tests", _GPU + "checks", 4, _TESTS, ("test_numerics",), floor=20),
)
