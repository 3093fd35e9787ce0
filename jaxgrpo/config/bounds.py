"""Bounds of settings: markers beside a field's type, as in `Annotated[int, AtLeast(1)]`.

They are the project's own, because the package annotated-types has neither the rules below nor
their messages, and would be one more dependency.
"""

import dataclasses

import numpy as np


class Bound:
    """One condition on a number. `str(bound)` describes it, e.g. `at least 1`."""

    def allows(self, value: float) -> bool:
        """Return whether the value is within the bound."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AtLeast(Bound):
    """The value is not below `least`."""

    least: float

    def allows(self, value: float) -> bool:
        return value >= self.least

    def __str__(self) -> str:
        return f"at least {self.least}"


@dataclasses.dataclass(frozen=True)
class AtMost(Bound):
    """The value is not above `most`."""

    most: float

    def allows(self, value: float) -> bool:
        return value <= self.most

    def __str__(self) -> str:
        return f"at most {self.most}"


@dataclasses.dataclass(frozen=True)
class Above(Bound):
    """The value is greater than `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        return value > self.limit

    def __str__(self) -> str:
        return f"above {self.limit}"


@dataclasses.dataclass(frozen=True)
class ZeroToBelow(Bound):
    """The value is in [0, limit), also after rounding to float32."""

    limit: float

    def allows(self, value: float) -> bool:
        return bool(0 <= np.float32(value) < self.limit)

    def __str__(self) -> str:
        return f"in [0, {self.limit}) and in float32 below {self.limit}"


@dataclasses.dataclass(frozen=True)
class SamplingTemperature(Bound):
    """The value is at least 0.01, to which vLLM raises lower ones, or 0 if greedy decoding is
    allowed."""

    greedy: bool = False

    def allows(self, value: float) -> bool:
        return value >= 0.01 or (self.greedy and value == 0)

    def __str__(self) -> str:
        zero = "0, or " if self.greedy else ""
        return f"{zero}at least 0.01 (vLLM raises lower ones to it)"


class Int64:
    """Marks an integer of up to 63 bits. All others have at most 31: they reach the device."""
