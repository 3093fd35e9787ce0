"""Two evaluations on the same tasks: is the difference more than chance? Pure.

A task's samples are alike, and the same task is as hard for both sides: so the tasks are
compared pairwise, each by the difference of its two pass rates.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from jaxgrpo.viewer.queries import Cell

MOST_STATES = 2_000_000


@dataclasses.dataclass(frozen=True)
class Paired:
    """`difference` is the mean over `tasks` of rate B minus rate A; `low` to `high` its 95 %
    interval (Student's t over tasks; None where fewer than two tasks or none differ), `p` of the
    exact sign-flip test (None where it would take too long). `gained` and `lost` name the tasks
    whose rate rose or fell, the greatest change first."""

    tasks: int
    rate_a: float
    rate_b: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    gained: tuple[str, ...]
    lost: tuple[str, ...]


def paired(a: Mapping[str, Cell], b: Mapping[str, Cell]) -> Paired | None:
    """Compare the tasks that both have; None when they share none."""
    shared = sorted(task for task in a.keys() & b.keys() if a[task].n and b[task].n)
    if not shared:
        return None
    rates = [(Fraction(a[t].passed, a[t].n), Fraction(b[t].passed, b[t].n)) for t in shared]
    differences = [after - before for before, after in rates]
    mean = float(sum(differences) / len(shared))
    low, high = interval([float(d) for d in differences])
    by_change = sorted(zip(differences, shared, strict=True))
    return Paired(
        tasks=len(shared),
        rate_a=float(sum(before for before, _ in rates) / len(shared)),
        rate_b=float(sum(after for _, after in rates) / len(shared)),
        difference=mean,
        low=low,
        high=high,
        p=sign_flip(differences),
        gained=tuple(task for d, task in reversed(by_change) if d > 0),
        lost=tuple(task for d, task in by_change if d < 0),
    )


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean's 95 % interval by Student's t, within [-1, 1]. (None, None) where the spread
    cannot be told."""
    n = len(differences)
    mean = sum(differences) / n
    squares = sum((d - mean) ** 2 for d in differences)
    if n < 2 or squares == 0:
        return None, None
    half = t_quantile(n - 1) * math.sqrt(squares / (n - 1) / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def sign_flip(differences: Sequence[Fraction]) -> float | None:
    """The two-sided p-value of the exact sign-flip (permutation) test: were A and B alike, each
    task's difference could as well have had the other sign. All sign patterns are counted, by
    adding up the distribution of the sum task by task (Fisher 1935, "The Design of Experiments",
    section 21; Pagano and Tritchler 1983, JASA 78:435-440).

    >>> sign_flip([Fraction(1)] * 5)
    0.0625
    """
    scale = math.lcm(*(d.denominator for d in differences))
    sizes = [abs(int(d * scale)) for d in differences if d]
    if not sizes:
        return 1.0
    if len(sizes) * sum(sizes) > MOST_STATES:
        return None
    observed = abs(int(sum(differences) * scale))
    chances = {0: 1.0}
    for size in sizes:
        grown: dict[int, float] = {}
        for total, chance in chances.items():
            for signed in (total - size, total + size):
                grown[signed] = grown.get(signed, 0.0) + chance / 2
        chances = grown
    return min(
        1.0, math.fsum(chance for total, chance in chances.items() if abs(total) >= observed)
    )


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Hill's expansion (1970, Algorithm 396, CACM
    13:619-620); 1 and 2 degrees are exact."""
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
