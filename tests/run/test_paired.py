"""The paired comparison of two evaluations, against values computed in other ways."""

import itertools
import math
from fractions import Fraction

import pytest

from jaxgrpo.run.paired import Tally, interval, paired, sign_flip, t_quantile


def test_the_sign_flip_test_counts_all_patterns() -> None:
    for differences in (
        [1, 1, -1, 2],
        [0, 3, 1],
        [Fraction(1, 8), Fraction(-3, 8), Fraction(1, 2), Fraction(5, 8), Fraction(1, 8)],
    ):
        observed = abs(sum(differences))
        patterns = [
            abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        expected = sum(total >= observed for total in patterns) / len(patterns)
        assert sign_flip([Fraction(d) for d in differences]) == pytest.approx(expected, abs=1e-12)
    assert sign_flip([Fraction(0)] * 5) == 1.0


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [
        (1, 12.706205),
        (2, 4.302653),
        (3, 3.182446),
        (4, 2.776445),
        (10, 2.228139),
        (37, 2.026192),
        (99, 1.984217),
        (1000, 1.962339),
    ],
)
def test_students_quantiles(freedom: int, expected: float) -> None:
    """Values of printed tables, to six places."""
    assert t_quantile(freedom) == pytest.approx(expected, abs=4e-6)


def test_a_mean_and_its_interval() -> None:
    low, high = interval([0.1, 0.3, 0.2, 0.4])
    assert (low, high) == (
        pytest.approx(0.25 - 3.182446 * 0.0645497, abs=1e-5),
        pytest.approx(0.25 + 3.182446 * 0.0645497, abs=1e-5),
    )
    assert interval([0.5]) == interval([0.5, 0.5]) == (None, None)


def test_one_sample_per_task_is_the_exact_mcnemar_test() -> None:
    """Of 30 tasks 10 are gained and 2 lost: twice the chance of at most 2 heads in 12 tosses."""
    before = {f"t{n}": Tally(int(n >= 25), 1) for n in range(30)}  # 25 to 29 pass
    after = {f"t{n}": Tally(int(n < 10 or n >= 27), 1) for n in range(30)}  # 25 and 26 are lost
    found = paired(before, after)
    assert found is not None
    assert found.test == "exact McNemar test"
    assert (len(found.gained), found.lost) == (10, ("t25", "t26"))
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    # 8/30 +- 2.045230 * 0.583292 / sqrt(30), the deviation from (12 - 30 * (8/30)^2) / 29
    assert found.low == pytest.approx(0.048862, abs=1e-5)
    assert found.high == pytest.approx(0.484471, abs=1e-5)


def test_tasks_that_only_one_side_has_are_left_out() -> None:
    a = {"up": Tally(0, 4), "down": Tally(4, 4), "same": Tally(2, 4), "only_a": Tally(4, 4)}
    b = {"up": Tally(8, 8), "down": Tally(7, 8), "same": Tally(4, 8), "unscored": Tally(0, 0)}
    found = paired(a, b)
    assert found is not None
    assert (found.tasks, found.gained, found.lost) == (3, ("up",), ("down",))
    assert found.difference == pytest.approx((1 - 1 / 8) / 3)
    assert found.test == "exact sign-flip test"
    assert found.p == pytest.approx(1.0)  # of (1, -1/8) all four patterns reach at least 7/8
    assert paired(a, {}) is None
    assert paired({"unscored": Tally(1, 1)}, b) is None


def test_many_tasks_of_many_samples_are_tested_too() -> None:
    """1,000 tasks with 64 samples: the normal approximation is close by then."""
    differences = [Fraction((n * 37) % 41 - 19, 64) for n in range(1000)]
    squares = float(sum(d * d for d in differences))
    z = abs(float(sum(differences))) / math.sqrt(squares)
    assert 1 < z < 4
    assert sign_flip(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_what_would_take_too_long_is_not_computed() -> None:
    assert sign_flip([Fraction(1, 1_000_003), Fraction(1, 999_983)] * 20) is None
