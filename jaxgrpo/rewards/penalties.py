"""Penalties that need no service: gibberish and useless repetition, by statistics of the policy's
texts, and tool results that the policy wrote itself.

Each replaces the whole reward of an episode in which it finds something (`jaxgrpo.rewards.base.Reward`),
and the score's notes say what it found. With weight 0 it only watches.
"""

import dataclasses
import functools
import re
import unicodedata
import zlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxgrpo.rewards.base import Reward, RewardFunction
from jaxgrpo.types import Score, Trajectory

_CALLS = re.compile(r"<tool>.*?</tool>|<tool_call>.*?</tool_call>", re.DOTALL)
_WORDS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SCRIPTS = frozenset(
    (
        "LATIN",
        "CYRILLIC",
        "ARMENIAN",
        "GEORGIAN",
        "HEBREW",
        "ARABIC",
        "DEVANAGARI",
        "BENGALI",
        "THAI",
    )
)
_WRITTEN_TOGETHER = frozenset(("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL"))
SHOWN_CHARS = 60


@dataclasses.dataclass(frozen=True)
class LocalGibberish(RewardFunction):
    """Gives `penalty` in place of all else to an episode in which the policy repeats itself or
    writes gibberish. It does where

    - a piece of a turn, of at most `longest_piece` characters, letters or digits among them, stands
      `repeats` times in a row or more, over `loop_chars` characters or more;
    - one turn, or a sequence of turns, stands `turn_repeats` times in a row or more;
    - the words of a turn beside its calls, `least_chars` or more, are compressed (zlib) by a
      factor above `compression`;
    - more than `broken_chars` characters are replacement characters, control characters, private or
      unassigned ones (but for replacement characters at a turn's end, where a limit may have cut);
    - more than `glued_words` different words have `glued_letters` letters or more, and these words
      more than `glued_fraction` of all letters; camelCase and snake_case are several words;
    - more than `mixed_words` words mix two scripts that are not written together, or letters of
      more than `most_scripts` scripts occur.

    With the defaults nothing is found in the demonstrations of BFCL's tasks and next to nothing in
    ordinary English; docs/rewards.md has the figures. Raises ValueError for thresholds that would
    find all of it.
    """

    parts: ClassVar[tuple[str, ...]] = ("gibberish",)
    penalty: float = -1.0
    repeats: int = 4
    loop_chars: int = 60
    longest_piece: int = 256
    turn_repeats: int = 4
    compression: float = 5.0
    least_chars: int = 400
    broken_chars: int = 1
    glued_letters: int = 18
    glued_words: int = 1
    glued_fraction: float = 0.05
    mixed_words: int = 2
    most_scripts: int = 3

    def __post_init__(self) -> None:
        least = {
            "repeats": 2,
            "turn_repeats": 2,
            "longest_piece": 1,
            "compression": 1,
        } | dict.fromkeys(
            (
                "loop_chars",
                "least_chars",
                "broken_chars",
                "glued_letters",
                "glued_words",
                "mixed_words",
            ),
            0,
        )
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least {limit}, got {getattr(self, name)}")

    def __call__(self, trajectory: Trajectory, score: Score) -> Reward:
        found = self.findings(trajectory.policy_texts)
        if not found:
            return Reward({"gibberish": 0.0})
        return Reward({"gibberish": self.penalty}, self.penalty, {"gibberish": "; ".join(found)})

    def findings(self, texts: Sequence[str]) -> list[str]:
        """What is wrong with an episode's texts, one for each turn; nothing where all is well."""
        spoken = [_CALLS.sub(" ", text) for text in texts]
        found = [self._loop(turn, text) for turn, text in enumerate(texts)]
        found += [self._compression(turn, text) for turn, text in enumerate(spoken)]
        found += [self._turns(texts), self._broken(texts)]
        found += [self._glued(spoken), self._scripts(spoken)]
        return [finding for finding in found if finding]

    def _loop(self, turn: int, text: str) -> str:
        piece = repeated_piece(text, self.repeats, self.loop_chars, self.longest_piece)
        return f"turn {turn} repeats {''.join(piece)[:SHOWN_CHARS]!r}" if piece else ""

    def _turns(self, texts: Sequence[str]) -> str:
        piece = repeated_piece(texts, self.turn_repeats, self.turn_repeats, len(texts))
        return f"turns repeat {piece[0][:SHOWN_CHARS]!r}" if piece else ""

    def _compression(self, turn: int, text: str) -> str:
        said = " ".join(re.findall(r"\w+", text))  # without rulers and spaces, which pack well
        if len(said) < self.least_chars:
            return ""
        data = said.encode("utf-8", "surrogatepass")
        ratio = len(data) / len(zlib.compress(data, 9))
        return f"turn {turn} compresses by {ratio:.1f}" if ratio > self.compression else ""

    def _broken(self, texts: Sequence[str]) -> str:
        count = sum(_is_broken(c) for text in texts for c in text.rstrip(_REPLACEMENT))
        return f"{count} broken characters" if count > self.broken_chars else ""

    def _glued(self, texts: Sequence[str]) -> str:
        words = [word for text in texts for word in _words(text) if word.isascii()]
        long = [word for word in words if len(word) >= self.glued_letters]
        share = sum(map(len, long)) / max(1, sum(map(len, words)))
        if len(set(long)) <= self.glued_words or share <= self.glued_fraction:
            return ""
        return f"{len(long)} words such as {long[0][:SHOWN_CHARS]!r}"

    def _scripts(self, texts: Sequence[str]) -> str:
        words = [{_script(c) for c in word} - {""} for text in texts for word in _words(text)]
        mixed = sum(len(scripts) > 1 and scripts != {"LATIN", "CJK"} for scripts in words)
        scripts = sorted(set[str]().union(*words))
        if mixed <= self.mixed_words and len(scripts) <= self.most_scripts:
            return ""
        return f"{mixed} words of mixed scripts, letters of {', '.join(scripts)}"


@dataclasses.dataclass(frozen=True)
class ForgedToolResult(RewardFunction):
    """Gives `penalty` in place of all else to an episode in which the policy itself writes one of
    `marks`, in letters of any case, with which results of tools begin and end."""

    parts: ClassVar[tuple[str, ...]] = ("forged_result",)
    penalty: float = -1.0
    marks: tuple[str, ...] = (
        "<tool_result>",
        "</tool_result>",
        "<tool_response>",
        "</tool_response>",
    )

    def __call__(self, trajectory: Trajectory, score: Score) -> Reward:
        texts = [text.lower() for text in trajectory.policy_texts]
        turns = [
            n for n, text in enumerate(texts) if any(mark.lower() in text for mark in self.marks)
        ]
        if not turns:
            return Reward({"forged_result": 0.0})
        note = {"forged_result": f"in turn {', '.join(map(str, turns))}"}
        return Reward({"forged_result": self.penalty}, self.penalty, note)


def repeated_piece(
    items: Sequence[str], repeats: int, least: int, longest_piece: int
) -> Sequence[str]:
    """The shortest piece, of at most `longest_piece` items, that stands `repeats` times in a row or
    more, over `least` items or more; empty when there is none. A piece of a text must have a letter
    or a digit: lines of dashes are in order.

    >>> repeated_piece("so so so so.", repeats=3, least=9, longest_piece=8)
    'so '
    """
    codes = {item: code for code, item in enumerate(dict.fromkeys(items))}
    ids = np.array([codes[item] for item in items], np.int32)
    for period in range(1, min(longest_piece, len(ids) // repeats) + 1):
        needed = max(repeats * period, least) - period
        same = np.concatenate(([False], ids[period:] == ids[:-period], [False]))
        begins, ends = np.flatnonzero(np.diff(same)).reshape(-1, 2).T
        for begin in begins[ends - begins >= needed]:
            piece = items[begin : begin + period]
            if not isinstance(piece, str) or any(map(str.isalnum, piece)):
                return piece
    return items[:0]


def _words(text: str) -> list[str]:
    return [word for run in _WORDS.findall(text) for word in _CAMEL.split(run)]


@functools.cache
def _is_broken(char: str) -> bool:
    if char in "\t\n\r":
        return False
    return char == _REPLACEMENT or unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs")


@functools.cache
def _script(letter: str) -> str:
    """The script of a letter, "" for those that go with any: Greek, as in formulas, and signs."""
    name = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if name in _WRITTEN_TOGETHER else name if name in _SCRIPTS else ""
