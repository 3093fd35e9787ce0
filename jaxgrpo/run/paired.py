"""Test whether two evaluations on the same tasks differ by more than chance. Pure functions.

The samples of one task are correlated, and a task is equally hard for both sides. The test
therefore compares pairs: for each task, the difference of its two pass rates.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

MOST_OPERATIONS = 1_000_000_000
"""Additions that the exact test may take; they run for about a second."""


@dataclasses.dataclass(frozen=True)
class Tally:
    """The outcomes of one task: how many of its `samples` passed."""

    passed: int
    samples: int

    def __str__(self) -> str:
        return f"{self.passed}/{self.samples}"


@dataclasses.dataclass(frozen=True)
class Paired:
    """The comparison of B with A on the `tasks` that both have.

    `rate_a` and `rate_b` are means over tasks. `difference` is the mean of rate B minus rate A, and
    `low` to `high` its 95 % interval by Student's t over tasks (None with one task, or if all
    differences are equal). `p` is the two-sided p-value of `test` (None if it would take too long).
    `gained` and `lost` are the tasks whose rate rose or fell, the largest change first.
    """

    tasks: int
    rate_a: float
    rate_b: float
    difference: float
    low: float | None
    high: float | None
    test: str
    p: float | None
    gained: tuple[str, ...]
    lost: tuple[str, ...]


def paired(a: Mapping[str, Tally], b: Mapping[str, Tally]) -> Paired | None:
    """Compare the tasks that both have samples of. Return None if there are none."""
    shared = sorted(task for task in a.keys() & b.keys() if a[task].samples and b[task].samples)
    if not shared:
        return None
    before = [Fraction(a[task].passed, a[task].samples) for task in shared]
    after = [Fraction(b[task].passed, b[task].samples) for task in shared]
    differences = [y - x for x, y in zip(before, after, strict=True)]
    low, high = interval([float(d) for d in differences])
    by_change = sorted(zip(differences, shared, strict=True))
    binary = all(rate in (0, 1) for rate in (*before, *after))
    return Paired(
        tasks=len(shared),
        rate_a=float(sum(before) / len(shared)),
        rate_b=float(sum(after) / len(shared)),
        difference=float(sum(differences) / len(shared)),
        low=low,
        high=high,
        test="exact McNemar test" if binary else "exact sign-flip test",
        p=sign_flip(differences),
        gained=tuple(task for d, task in reversed(by_change) if d > 0),
        lost=tuple(task for d, task in by_change if d < 0),
    )


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean by Student's t, within [-1, 1]; (None, None) if the
    differences have no spread."""
    n = len(differences)
    mean = sum(differences) / n
    squares = sum((d - mean) ** 2 for d in differences)
    if n < 2 or squares == 0:
        return None, None
    half = t_quantile(n - 1) * math.sqrt(squares / (n - 1) / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def sign_flip(differences: Sequence[Fraction]) -> float | None:
    """Return the two-sided p-value of the exact sign-flip (permutation) test, or None if it would
    take too long.

    If A and B are alike, each task's difference could as well have had the other sign. The test
    counts all sign patterns whose sum is at least as far from 0, by adding up the distribution of
    the sum task by task (Fisher 1935, "The Design of Experiments", section 21; Pagano and Tritchler
    1983, JASA 78:435-440). With one sample per task it is the exact McNemar test (1947,
    Psychometrika 12:153-157): the binomial test of the tasks gained among those that changed.

    >>> sign_flip([Fraction(1)] * 5)
    0.0625
    """
    scale = math.lcm(*(d.denominator for d in differences))
    sizes = [abs(int(d * scale)) for d in differences if d]
    if not sizes:
        return 1.0
    whole = sum(sizes)
    if len(sizes) * whole > MOST_OPERATIONS:
        return None
    chances = np.zeros(whole + 1)  # of each sum of the positive differences, over all patterns
    chances[0] = 1.0
    for size in sizes:
        flipped = chances[:-size].copy()
        chances[size:] += flipped
        chances /= 2
    observed = abs(int(sum(differences) * scale))
    far = np.abs(2 * np.arange(whole + 1) - whole) >= observed
    return min(1.0, math.fsum(chances[far]))


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by Hill's expansion (1970, Algorithm 396, CACM
    13:619-620); it is exact for 1 and 2 degrees of freedom."""
    p = 0.05
    if freedom == 1:
        return math.cos(p * math.pi / 2) / math.sin(p * math.pi / 2)
    if freedom == 2:
        return math.sqrt(2 / (p * (2 - p)) - 2)
    n = float(freedom)
    a = 1 / (n - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * n
    y = (d * p) ** (2 / n)
    if y > 0.05 + a:
        x = -1.959963984540054
        y = x * x
        if freedom < 5:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = (
            (1 / (((n + 6) / (n * y) - 0.089 * d - 0.822) * (n + 2) * 3) + 0.5 / (n + 4)) * y - 1
        ) * (n + 1) / (n + 2) + 1 / y
    return math.sqrt(n * y)
