"""What a run says when its metrics look bad: when, how often, and in agreement with the page."""

import re
from pathlib import Path

import pytest

from jaxgrpo.run.warnings_in_words import AGAIN, WARNINGS, Watch

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
HEALTHY = {
    "train/no_signal_fraction": 0.3,
    "train/overlong_fraction": 0.05,
    "train/mismatch_mean": 4e-7,
    "train/mismatch_outside_fraction": 0.0,
    "train/entropy": 0.25,
    "train/clip_fraction": 0.02,
    "train/kl": 0.06,
    "train/grad_norm": 0.3,
    "train/tool_calls_mean": 0.9,
    "time/trainer_idle_fraction": 0.25,
}


def said(*batches: dict[str, float]) -> list[list[str]]:
    """Return the warnings after each batch, the values of which differ from the healthy ones."""
    watch, texts = Watch(), []
    for changes in batches:
        watch.add(HEALTHY | changes)
        texts.append(watch.warnings())
    return texts


def first(texts: list[list[str]]) -> tuple[int, str]:
    """Return the number of the first batch with a warning, and the only one there."""
    at = next(n for n, each in enumerate(texts, 1) if each)
    (text,) = texts[at - 1]
    return at, text


def constant(batches: int, **changes: float) -> list[dict[str, float]]:
    return [{key.replace("__", "/"): value for key, value in changes.items()}] * batches


def test_a_healthy_run_is_not_warned_of() -> None:
    assert not any(said(*constant(300)))


def test_three_batches_without_signal() -> None:
    at, text = first(said({}, *constant(5, train__no_signal_fraction=1.0)))
    assert at == 4 and text.startswith("no group has had signal for 3 batches")
    assert "rollout.group_size" in text and "most-groups-have-no-signal" in text


def test_batches_that_rarely_have_signal() -> None:
    at, text = first(said(*constant(12, train__no_signal_fraction=0.9)))
    assert at == 10 and text.startswith("90% of the groups of the last 10 batches have no signal")


@pytest.mark.parametrize(
    ("changes", "at", "begin"),
    [
        ({"train__overlong_fraction": 0.6}, 5, "60% of the episodes of the last 5 batches ran out"),
        ({"train__mismatch_outside_fraction": 0.2}, 5, "sampler and trainer differ by more than"),
        ({"train__clip_fraction": 0.15}, 5, "the ratio of 15% of the tokens is clipped"),
        ({"train__kl": 0.3}, 5, "the KL to the reference policy is 0.3 nats"),
        ({"time__trainer_idle_fraction": 0.7}, 5, "the trainer waits for episodes 70% of the time"),
    ],
)
def test_means_above_their_limit(changes: dict[str, float], at: int, begin: str) -> None:
    number, text = first(said(*constant(8, **changes)))
    assert number == at and text.startswith(begin)


@pytest.mark.parametrize(
    ("changes", "begin"),
    [
        ({"train__mismatch_mean": 0.004}, "sampler and trainer disagree more and more: 4e-07, now"),
        ({"train__entropy": 0.001}, "the entropy collapses: 0.25 at first, now"),
        ({"train__tool_calls_mean": 0.0}, "the policy stops using tools: 0.9 calls per episode, "),
    ],
)
def test_means_far_from_those_of_the_first_batches(changes: dict[str, float], begin: str) -> None:
    number, text = first(said(*constant(10), *constant(8, **changes)))
    assert 10 < number <= 15 and text.startswith(begin)


def test_one_spike_is_none_and_two_are() -> None:
    spike = constant(1, train__grad_norm=4.0)
    assert not any(said(*constant(30), *spike, *constant(10)))
    at, text = first(said(*constant(30), *spike, *constant(2), *spike))
    assert at == 34 and text.startswith("the gradient norm was ten times its median in 2 of 10")


def test_a_warning_is_repeated_only_after_a_long_time() -> None:
    texts = said(*constant(AGAIN + 10, train__kl=0.3))
    assert [number for number, each in enumerate(texts, 1) if each] == [5, AGAIN + 5]


def test_missing_values_and_null_are_not_counted() -> None:
    watch = Watch()
    for _ in range(20):
        watch.add({"train/kl": None, "reward/x": 1.0})  # type: ignore[dict-item]
        assert watch.warnings() == []


def test_dropped_groups_with_the_last_line_of_the_reason() -> None:
    watch = Watch()
    (text,) = watch.dropped(2, 'Traceback ...\n  File "env.py"\nKeyError: "lost"\n')
    assert text.startswith("2 groups were dropped, because the environment or a reward function")
    assert 'on every try: KeyError: "lost". ' in text
    assert watch.dropped(1, "again") == []
    assert Watch().dropped(0, "") == []


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_warnings_refer_to_keys_and_sections_of_the_page() -> None:
    assert len(WARNINGS) > 8
    assert {w.anchor for w in WARNINGS} | {"groups-are-dropped"} <= anchors(PAGE)
    assert [w.key for w in WARNINGS if f"| `{w.key}` |" not in PAGE] == []


LIMITS = [
    ("train/overlong_fraction", "Above 0.1*", 0.09, 0.11),
    ("train/mismatch_outside_fraction", "Above 0.1*", 0.09, 0.11),
    ("train/clip_fraction", "Above 0.1*", 0.09, 0.11),
    ("train/kl", "above 0.1*", 0.09, 0.11),
    ("time/trainer_idle_fraction", "Above 0.5*", 0.49, 0.51),
    ("train/no_signal_fraction", "Above 0.8 for ten batches*", 0.79, 0.81),
    ("train/no_signal_fraction", "1 for three*", 0.79, 1.0),
    ("train/mismatch_mean", "and more than 0.001*", 0.0009, 0.0011),
    ("train/entropy", "below a tenth of the value at first*", 0.026, 0.024),
    (
        "train/tool_calls_mean",
        "Below a tenth of the value at first, if that was 0.5 or more*",
        0.091,
        0.089,
    ),
    ("train/grad_norm", "ten times the median, in two of ten batches*", 2.9, 3.1),
]


@pytest.mark.parametrize(("key", "words", "fine", "bad"), LIMITS)
def test_limits_are_those_of_the_page(key: str, words: str, fine: float, bad: float) -> None:
    """On its good side a value says nothing, on the other one it does; the page has the limit."""
    (row,) = re.findall(rf"^\| `{re.escape(key)}` .*$", PAGE, re.MULTILINE)
    assert words in row
    few = 2 if key == "train/grad_norm" else 10
    assert not any(said(*constant(30), *[{key: fine}] * few))
    assert any(said(*constant(30), *[{key: bad}] * few))


def test_the_page_marks_exactly_the_limits_that_are_watched() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \|(.*)\|$", PAGE, re.MULTILINE)
    marked = {key for key, row in rows if re.search(r"\w\*", re.sub(r"\*\w+\*", "", row))}
    assert marked == {key for key, *_ in LIMITS} | {"train/dropped_groups"}
    assert {rule.key for rule in WARNINGS} == {key for key, *_ in LIMITS}
