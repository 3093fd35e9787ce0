"""Pass rates with their uncertainty: pure functions of who passed.

`passed_NG` says for each of N tasks and G samples whether the sample passed. The samples of one task are alike, so N * G samples say
less than as many independent ones; the intervals here count them for what they are worth. They are about tasks like these, of which the N
at hand are a sample, not about these N tasks alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


@dataclasses.dataclass(frozen=True)
class PassRate:
    """The share of samples that passed, with its 95 % interval, e.g. `PassRate(0.5, 0.253, 0.747, tasks=8, samples=4, ...)`.

    `correlation` is the intraclass correlation of a task's samples, `effective_samples` the number of independent ones that say as much.
    """

    rate: float
    low: float
    high: float
    tasks: int
    samples: int
    correlation: float
    effective_samples: float


def pass_rate(passed_NG: np.ndarray) -> PassRate:
    """pass@1 of N tasks with G samples each, and its interval.

    Wilson's interval (1927, "Probable inference, the law of succession, and statistical inference", JASA 22:209-212) with the effective
    number of samples N G / (1 + (G - 1) r): the denominator is the design effect (Kish 1965, "Survey Sampling"), r the intraclass
    correlation. Saha, Miller and Wang (2016, "A comparison of some approximate confidence intervals for a single proportion for clustered
    binary outcome data", Int. J. Biostat. 12) compare it with others.
    """
    n, g = _tasks_and_samples(passed_NG)
    rate = float(np.mean(passed_NG))
    correlation = intraclass_correlation(passed_NG)
    effective = n * g / (1 + (g - 1) * correlation)
    low, high = wilson_interval(rate, effective)
    return PassRate(rate, low, high, n, g, correlation, effective)


def intraclass_correlation(passed_NG: np.ndarray) -> float:
    """How alike the samples of one task are, from 0 (like any two samples) to 1 (all the same): the one-way ANOVA estimator, clipped.

        r = (MSB - MSW) / (MSB + (G - 1) MSW)

    with the mean squares between and within tasks (Ridout, Demetrio and Firth 1999, "Estimating intraclass correlation for binary data",
    Biometrics 55:137-148). Where the data cannot tell (one task, one sample a task, or all outcomes equal) it is 1, the cautious answer.
    """
    n, g = _tasks_and_samples(passed_NG)
    if n == 1 or g == 1:
        return 1.0
    rate_N = np.mean(passed_NG, axis=1, dtype=np.float64)
    between = g * np.sum((rate_N - rate_N.mean()) ** 2) / (n - 1)
    within = g * np.sum(rate_N * (1 - rate_N)) / (n * (g - 1))
    if between + (g - 1) * within == 0:
        return 1.0
    return float(np.clip((between - within) / (between + (g - 1) * within), 0, 1))


def wilson_interval(rate: float, samples: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion seen in `samples` independent samples (which may be a fraction)."""
    if not 0 <= rate <= 1 or samples <= 0:
        raise ValueError(f"rate must be in [0, 1] and samples above 0, got {rate} and {samples}")
    z2 = Z_95**2 / samples
    centre = (rate + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(rate * (1 - rate) / samples + z2 / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that at least one of k samples passes, estimated without bias from `passed` of `samples`.

        1 - C(n - c, k) / C(n, k)

    (Chen et al. 2021, "Evaluating large language models trained on code", arXiv:2107.03374, equation 1).
    """
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(
            f"pass@k needs 0 <= passed <= samples and 1 <= k <= samples, got passed={passed}, samples={samples}, k={k}"
        )
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_pass_at_k(passed_NG: np.ndarray, k: int) -> float:
    """pass@k, averaged over the N tasks."""
    _, g = _tasks_and_samples(passed_NG)
    return float(np.mean([pass_at_k(g, int(passed), k) for passed in np.sum(passed_NG, axis=1)]))


def pass_rates_by_label(
    passed_NG: np.ndarray, labels_N: Sequence[Sequence[str]]
) -> Mapping[str, PassRate]:
    """The pass rate of each label's tasks, labels in alphabetical order. A task counts once under each of its labels."""
    n, _ = _tasks_and_samples(passed_NG)
    if len(labels_N) != n:
        raise ValueError(f"there are outcomes of {n} tasks and labels of {len(labels_N)}")
    names = sorted({label for labels in labels_N for label in labels})
    return {
        name: pass_rate(passed_NG[np.array([name in labels for labels in labels_N])])
        for name in names
    }


def _tasks_and_samples(passed_NG: np.ndarray) -> tuple[int, int]:
    if passed_NG.ndim != 2 or passed_NG.size == 0 or passed_NG.dtype != bool:
        raise ValueError(
            f"passed_NG must be a filled array of booleans [tasks, samples], got {passed_NG.dtype} {passed_NG.shape}"
        )
    return passed_NG.shape[0], passed_NG.shape[1]
