"""Watch the metrics of a run. If they look bad, say so in words, and say what to try.

The thresholds are those in the "worry when" columns of docs/metrics.md. A warning looks at several
batches in a row, because single batches are noisy. It is repeated only after many batches.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from jaxgrpo.run.metrics import Metrics

PAGE = "docs/metrics.md"
BATCHES = 5
"""Batches that most warnings look at: the newest ones, compared with the first ones."""
MANY_BATCHES = 10
AGAIN = 100
"""A warning is repeated if its cause holds again this many batches later."""


@dataclasses.dataclass(frozen=True)
class WarningRule:
    """A warning about `key`. `found` gets the values of `key`, the newest last, and returns what is
    wrong, or "" if nothing is. `advice` says what to try, `anchor` is a section of the page."""

    key: str
    found: Callable[[Sequence[float]], str]
    advice: str
    anchor: str


def above(limit: float, what: str, batches: int = BATCHES) -> Callable[[Sequence[float]], str]:
    """Find a mean of the newest batches above a limit. `what` has a place for the mean."""

    def found(values: Sequence[float]) -> str:
        mean = statistics.fmean(values[-batches:])
        return what.format(mean) if len(values) >= batches and mean > limit else ""

    return found


def fallen(fraction: float, least: float, what: str) -> Callable[[Sequence[float]], str]:
    """Find a mean of the newest batches below a fraction of that of the first ones, if that was at
    least `least`."""

    def found(values: Sequence[float]) -> str:
        first, last = statistics.fmean(values[:BATCHES]), statistics.fmean(values[-BATCHES:])
        enough = len(values) >= 2 * BATCHES and first >= least
        return what.format(first, last) if enough and last < fraction * first else ""

    return found


def risen(times: float, least: float, what: str) -> Callable[[Sequence[float]], str]:
    """Find a mean of the newest batches of at least `least` that is `times` that of the first."""

    def found(values: Sequence[float]) -> str:
        first, last = statistics.fmean(values[:BATCHES]), statistics.fmean(values[-BATCHES:])
        enough = len(values) >= 2 * BATCHES and last >= least
        return what.format(first, last) if enough and last > times * first else ""

    return found


def spikes(times: float, what: str) -> Callable[[Sequence[float]], str]:
    """Find two or more of the newest batches far above the median of all."""

    def found(values: Sequence[float]) -> str:
        limit = times * statistics.median(values)
        count = sum(value > limit for value in values[-MANY_BATCHES:])
        return what.format(count) if len(values) >= 2 * MANY_BATCHES and count > 1 else ""

    return found


def silent(values: Sequence[float]) -> str:
    """Find batches in a row without any group that has signal."""
    few = min(len(values), 3)
    if few < 3 or min(values[-few:]) < 1:
        return ""
    count = next((n for n, value in enumerate(reversed(values)) if value < 1), len(values))
    return (
        f"no group has had signal for {count} batches: all episodes of a group got the same reward,"
        " so nothing can be learned"
    )


EASIER = (
    "If they all fail, give easier tasks, more samples (rollout.group_size), or rewards for "
    "progress. If they all pass, give harder tasks."
)
WARNINGS = (
    WarningRule("train/no_signal_fraction", silent, EASIER, "most-groups-have-no-signal"),
    WarningRule(
        "train/no_signal_fraction",
        above(0.8, f"{{:.0%}} of the groups of the last {MANY_BATCHES} batches have no signal", 10),
        EASIER,
        "most-groups-have-no-signal",
    ),
    WarningRule(
        "train/overlong_fraction",
        above(0.1, f"{{:.0%}} of the episodes of the last {BATCHES} batches ran out of tokens"),
        "Raise rollout.max_completion_tokens, or shorten the results of tools. If the texts are "
        "nonsense, set batching.masked_stop_reasons=(), so that such episodes are punished.",
        "many-episodes-are-overlong",
    ),
    WarningRule(
        "train/mismatch_mean",
        risen(3, 1e-3, "sampler and trainer disagree more and more: {:.2g}, now {:.2g} nats"),
        "Look whether the sampler serves the newest weights (check/mismatch_mean), and set "
        "loss.tis_cap=2.0.",
        "sampler-and-trainer-disagree",
    ),
    WarningRule(
        "train/mismatch_outside_fraction",
        above(0.1, "sampler and trainer differ by more than 10 % on {:.0%} of the tokens"),
        "Look for another model folder or dtype, set vllm.float32_logits, or correct for it with "
        "loss.tis_cap=2.0.",
        "sampler-and-trainer-disagree",
    ),
    WarningRule(
        "train/entropy",
        fallen(0.1, 0.0, "the entropy collapses: {:.2g} at first, now {:.2g} nats per token"),
        "Lower optimizer.learning_rate, set training.iterations=1, raise loss.clip_high to 0.28, "
        "or raise loss.kl_beta.",
        "entropy-collapses",
    ),
    WarningRule(
        "train/clip_fraction",
        above(0.1, "the ratio of {:.0%} of the tokens is clipped"),
        "The steps on a batch are too large or too many: lower optimizer.learning_rate or "
        "training.iterations.",
        "loss-and-policy",
    ),
    WarningRule(
        "train/kl",
        above(0.1, "the KL to the reference policy is {:.2g} nats per token"),
        "Lower optimizer.learning_rate, raise loss.kl_beta, or check that the reward is not earned "
        "by something unintended.",
        "kl-grows",
    ),
    WarningRule(
        "train/grad_norm",
        spikes(10, f"the gradient norm was ten times its median in {{}} of {MANY_BATCHES} batches"),
        "Read the episodes of these batches, and lower optimizer.learning_rate.",
        "the-gradient-norm-spikes",
    ),
    WarningRule(
        "train/tool_calls_mean",
        fallen(0.1, 0.5, "the policy stops using tools: {:.2g} calls per episode, now {:.2g}"),
        "Read episodes: can a reward be earned without a call?",
        "rewards-and-episodes",
    ),
    WarningRule(
        "time/trainer_idle_fraction",
        above(0.5, "the trainer waits for episodes {:.0%} of the time"),
        "Sample while it trains (training.max_staleness=1, with loss.tis_cap=2.0), or give the "
        "sampler more devices.",
        "time-and-speed",
    ),
)


class Watch:
    """Remembers the metrics of the batches of a run."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._batches = 0
        self._said: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        """Remember a batch."""
        self._batches += 1
        for key in {warning.key for warning in WARNINGS}:
            value = metrics.get(key)
            if isinstance(value, (int, float)):
                self._values.setdefault(key, []).append(float(value))

    def warnings(self) -> list[str]:
        """Return what there is to say about the newest batch and those before it. Of several
        warnings with one section of the page, the first is given."""
        texts = []
        for warning in WARNINGS:
            values = self._values.get(warning.key)
            if values and (found := warning.found(values)) and self._is_news(warning.anchor):
                texts.append(f"{found}. {warning.advice} See {PAGE}#{warning.anchor}")
        return texts

    def dropped(self, count: int, error: str) -> list[str]:
        """Return the warning about groups that were dropped. `error` is the last one's."""
        if not count or not self._is_news("groups-are-dropped"):
            return []
        groups = f"{count} group{'s were' if count > 1 else ' was'} dropped"
        reason = error.strip().splitlines()[-1] if error.strip() else "no reason is known"
        return [
            f"{groups}, because the environment or a reward function failed on every try: {reason}."
            f" Dropped groups are not trained on. See {PAGE}#groups-are-dropped"
        ]

    def _is_news(self, anchor: str) -> bool:
        said = self._said.get(anchor)
        if said is not None and self._batches - said < AGAIN:
            return False
        self._said[anchor] = self._batches
        return True
