"""The tokens of an episode with what is known of each, and their colors. Pure."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxgrpo.viewer.episode import PER_TOKEN, Episode

STEPS = 9
"""Shades of a color: 0 is none, 8 the strongest."""

LARGE_ADVANTAGE = 2.0
"""From here on an advantage has the strongest color: two standard deviations of a group."""

COLORS = {
    "mask": "loss mask: which tokens the policy sampled",
    "sampler_logprobs": "sampler log-probability",
    "train_logprobs": "trainer log-probability",
    "ratio": "ratio of trainer to old policy",
    "kl": "KL to the reference, estimated",
    "gap": "gap between trainer and sampler",
    "entropies": "entropy",
    "advantage": "advantage",
    "loss_weights": "loss weight",
    "weight_versions": "version of the weights",
}
"""What tokens can be colored by."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token: its place in the completion, id, text, shade (0 to 8; negative for values below
    zero of what has two signs), whether it was sampled, and its figures by name."""

    place: int
    id: int
    text: str
    shade: int
    sampled: bool
    figures: dict[str, float | int | None]


def available(episode: Episode) -> list[str]:
    """What this episode's tokens can be colored by: what is recorded, and what follows from it."""
    has = episode.figures
    known = {
        "mask": bool(episode.sampled),
        "weight_versions": bool(episode.weight_versions),
        "advantage": episode.advantage is not None,
    }
    known |= {key: key in has for key in PER_TOKEN}
    known["gap"] = "sampler_logprobs" in has and ("train_logprobs" in has or "old_logprobs" in has)
    known["ratio"] = "train_logprobs" in has and "old_logprobs" in has
    known["kl"] = "train_logprobs" in has and "reference_logprobs" in has
    return [key for key in COLORS if known[key]]


def tokens(episode: Episode, pieces: Sequence[str], by: str, start: int = 0) -> list[Token]:
    """The completion's tokens from `start` on, as many as there are pieces of text."""
    shown = []
    values = [figures(episode, place) for place in range(start, start + len(pieces))]
    shade = shades([value.get(by) for value in values], by)
    for offset, (piece, value, color) in enumerate(zip(pieces, values, shade, strict=True)):
        place = start + offset
        sampled = bool(at(episode.sampled, place))
        shown.append(Token(place, episode.completion_ids[place], piece, color, sampled, value))
    return shown


def figures(episode: Episode, place: int) -> dict[str, float | int | None]:
    """What is known of one completion token; nothing of one that was not sampled but its mask."""
    sampled = bool(at(episode.sampled, place))
    known: dict[str, float | int | None] = {"mask": int(sampled)}
    if not sampled:
        return known
    for key, values in episode.figures.items():
        known[key] = at(values, place)
    known["weight_versions"] = at(episode.weight_versions, place)
    if episode.advantage is not None:
        known["advantage"] = episode.advantage
    train, sampler = known.get("train_logprobs"), known.get("sampler_logprobs")
    old, reference = known.get("old_logprobs"), known.get("reference_logprobs")
    first = train if old is None else old  # with one step on a batch, they are the same
    known["gap"] = None if first is None or sampler is None else round(first - sampler, 4)
    known["ratio"] = None if train is None or old is None else _exp(train - old)
    known["kl"] = (
        None
        if train is None or reference is None
        else _exp(reference - train) - (reference - train) - 1
    )
    return {key: value for key, value in known.items() if value is not None}


def at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def _exp(value: float) -> float:
    return math.exp(min(value, 80.0))


def shades(values: Sequence[float | int | None], by: str) -> list[int]:
    """A shade for each value: of log-probabilities by the probability, of others by their share
    of the largest."""
    return [
        0 if value is None else shade
        for value, shade in zip(values, map(_scale(values, by), values), strict=True)
    ]


def _scale(values: Sequence[float | int | None], by: str) -> Callable[[float | int | None], int]:
    most = STEPS - 1
    known = [value for value in values if value is not None]
    if by == "mask":
        return lambda value: 3 if value else 0
    if by == "weight_versions":
        versions = sorted(set(known))
        return lambda value: 1 + versions.index(value) * 2 % most if value is not None else 0
    if by.endswith("_logprobs"):
        return lambda value: 0 if value is None else round((1 - math.exp(min(0.0, value))) * most)
    if by == "ratio":
        return lambda value: 0 if not value else _signed(math.log(value), 0.5)
    if by == "advantage":  # the same for all tokens: compared with that of other episodes
        return lambda value: 0 if value is None else _signed(value, LARGE_ADVANTAGE)
    largest = max((abs(value) for value in known), default=0.0)
    return lambda value: 0 if value is None else _signed(value, largest)


def _signed(value: float, largest: float) -> int:
    if not largest:
        return 0
    return round(max(-1.0, min(1.0, value / largest)) * (STEPS - 1))
