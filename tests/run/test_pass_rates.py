"""Pass rates: values worked by hand, borders, and the intervals' coverage in a simulation."""

from typing import Any

import numpy as np
import pytest

from jaxgrpo.run.pass_rates import (
    intraclass_correlation,
    mean_pass_at_k,
    pass_at_k,
    pass_rate,
    pass_rates_by_label,
    wilson_interval,
)


def outcomes(*rows: str) -> np.ndarray:
    return np.array([[letter == "1" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("rate", "samples", "low", "high"),
    [
        # z^2 = 3.8414588; 0 of 10: high = z^2 / (10 + z^2);
        # 5 of 10: half = sqrt(z^2 / (4 (10 + z^2)))
        (0.0, 10, 0.0, 0.2775328),
        (1.0, 10, 0.7224672, 1.0),
        (0.5, 10, 0.2365931, 0.7634069),
    ],
)
def test_wilson_interval_by_hand(rate: float, samples: int, low: float, high: float) -> None:
    np.testing.assert_allclose(wilson_interval(rate, samples), (low, high), atol=1e-7)


@pytest.mark.parametrize(
    ("passed", "samples", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)]
)
def test_wilson_interval_as_published(passed: int, samples: int, low: float, high: float) -> None:
    """Newcombe 1998, table I.

    "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17:857-872.
    """
    np.testing.assert_allclose(wilson_interval(passed / samples, samples), (low, high), atol=5e-5)


def test_intraclass_correlation_by_hand() -> None:
    # Rates 1, 1/2, 0; mean 1/2. MSB = 2 (1/4 + 0 + 1/4) / 2 = 1/2; MSW = 2 (1/4) / 3 = 1/6;
    # r = (1/2 - 1/6) / (1/2 + 1/6) = 1/2.
    assert intraclass_correlation(outcomes("11", "10", "00")) == pytest.approx(0.5)


def test_intraclass_correlation_of_three_samples_by_hand() -> None:
    # Rates 2/3, 1/3; mean 1/2. MSB = 3 (2/36) / 1 = 1/6; MSW = 3 (4/9) / 4 = 1/3;
    # r = (-1/6) / (1/6 + 2/3) = -1/5, clipped to 0.
    assert intraclass_correlation(outcomes("110", "010")) == 0.0


def test_intraclass_correlation_of_four_samples_by_hand() -> None:
    # Rates 3/4, 1/4, 0; mean 1/3. MSB = 4 (25 + 1 + 16) / 144 / 2 = 7/12;
    # MSW = 4 (3/16 + 3/16) / 9 = 1/6;
    # r = (5/12) / (7/12 + 1/2) = 5/13.
    assert intraclass_correlation(outcomes("1110", "0100", "0000")) == pytest.approx(5 / 13)


@pytest.mark.parametrize(
    "rows", [("1100",), ("1", "0", "1"), ("11", "11"), ("00", "00"), ("11", "00")]
)
def test_correlation_is_one_where_samples_agree_or_nothing_can_be_told(
    rows: tuple[str, ...],
) -> None:
    assert intraclass_correlation(outcomes(*rows)) == 1.0


def test_pass_rate_by_hand() -> None:
    # r = 1/2, design effect 3/2, 6 samples are worth 4:
    # half = sqrt(z^2 / (4 (4 + z^2))) = 0.3499519 around 1/2.
    rate = pass_rate(outcomes("11", "10", "00"))
    assert (rate.rate, rate.tasks, rate.samples) == (0.5, 3, 2)
    assert rate.effective_samples == pytest.approx(4.0)
    np.testing.assert_allclose((rate.low, rate.high), (0.1500390, 0.8499610), atol=1e-6)


def test_one_sample_a_task_is_plain_wilson() -> None:
    rate = pass_rate(outcomes(*"1111100000"))
    np.testing.assert_allclose((rate.low, rate.high), (0.2365931, 0.7634069), atol=1e-7)


def test_repeated_samples_that_always_agree_say_no_more_than_one() -> None:
    once, often = pass_rate(outcomes("1", "0", "0")), pass_rate(outcomes("1111", "0000", "0000"))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_interval_covers_the_true_rate_about_as_often_as_it_says(spread: float) -> None:
    """Tasks drawn from Beta(a, b) of mean 0.4.

    `spread` is a + b: small means that a task is either easy or hard.
    """
    rng = np.random.default_rng(0)
    covered, naive_covered = 0, 0
    for _ in range(1000):
        chance_N = rng.beta(0.4 * spread, 0.6 * spread, size=50)
        passed_NG = rng.random((50, 4)) < chance_N[:, None]
        rate = pass_rate(passed_NG)
        covered += rate.low <= 0.4 <= rate.high
        low, high = wilson_interval(rate.rate, passed_NG.size)
        naive_covered += low <= 0.4 <= high
    assert 0.93 <= covered / 1000 <= 0.98
    assert naive_covered / 1000 < 0.90  # taking the samples for independent promises too much


@pytest.mark.parametrize(
    ("samples", "passed", "k", "expected"),
    [
        (5, 0, 3, 0.0),
        (5, 5, 1, 1.0),
        (5, 2, 1, 0.4),
        (5, 2, 2, 0.7),  # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
        (5, 2, 4, 1.0),  # four of five cannot all be among the three that failed
        (10, 3, 5, 11 / 12),  # 1 - C(7, 5) / C(10, 5) = 1 - 21 / 252
        (2000, 1, 1000, 0.5),
    ],
)
def test_pass_at_k(samples: int, passed: int, k: int, expected: Any) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(expected)


def test_pass_at_k_has_no_bias() -> None:
    """Averaged over all draws of 4 samples with chance 1/4 each, pass@2 is 1 - (3/4)^2: 7/16."""
    binomial = [81, 108, 54, 12, 1]  # ways of 4 samples with c passes, out of 256
    assert sum(ways * pass_at_k(4, c, 2) for c, ways in enumerate(binomial)) / 256 == pytest.approx(
        7 / 16
    )


def test_mean_pass_at_k_averages_over_tasks() -> None:
    assert mean_pass_at_k(outcomes("11000", "00000"), k=2) == pytest.approx(0.35)


def test_a_task_counts_under_each_of_its_labels() -> None:
    rates = pass_rates_by_label(
        outcomes("11", "10", "00"), [("Files", "Math"), ("Math",), ("Files",)]
    )
    assert list(rates) == ["Files", "Math"]
    assert (rates["Files"].rate, rates["Files"].tasks) == (0.5, 2)
    assert (rates["Math"].rate, rates["Math"].tasks) == (0.75, 2)


@pytest.mark.parametrize("passed", [np.zeros((2, 0), bool), np.zeros(3, bool), np.zeros((2, 2))])
def test_what_is_not_a_table_of_outcomes_is_refused(passed: Any) -> None:
    with pytest.raises(ValueError, match="filled array of booleans"):
        pass_rate(passed)


def test_labels_of_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="outcomes of 1 tasks and labels of 2"):
        pass_rates_by_label(outcomes("1"), [("a",), ("b",)])


def test_rounding_does_not_take_the_interval_beyond_0_and_1() -> None:
    ends = [(wilson_interval(0.0, n)[0], wilson_interval(1.0, n)[1]) for n in range(1, 500)]
    assert all(0 <= low < 1e-15 and 1 - 1e-15 < high <= 1 for low, high in ends)


@pytest.mark.parametrize(("rate", "samples"), [(0.5, 0), (0.5, -1), (-0.1, 5), (1.1, 5)])
def test_wilson_interval_refuses_nonsense(rate: float, samples: int) -> None:
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\] and samples above 0"):
        wilson_interval(rate, samples)


@pytest.mark.parametrize(("samples", "passed", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses_nonsense(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(samples, passed, k)
