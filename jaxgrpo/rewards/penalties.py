"""Penalties that need no service: for gibberish and useless repetition, found by statistics of the
policy's texts, and for tool results that the policy wrote itself.

Each penalty replaces the whole reward (`jaxgrpo.rewards.base.Reward`), and the score's notes say
what was found. With weight 0, findings are recorded only.
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
    """Replaces the reward of an episode by `penalty` if the policy repeats itself or writes
    gibberish. That is the case if

    - a piece of a turn, of at most `longest_piece` characters with a letter or digit, occurs at
      least `repeats` times in a row, over at least `loop_chars` characters;
    - one turn, or a sequence of turns, occurs at least `turn_repeats` times in a row;
    - the words of a turn without its calls, at least `least_chars` characters, are compressed
      (zlib) by a factor above `compression`;
    - more than `broken_chars` characters are replacement, control, private or unassigned ones;
      replacement characters at the end of a turn, where a limit may have cut, do not count;
    - more than `glued_words` different words have at least `glued_letters` letters, and these words
      have more than `glued_fraction` of all letters; camelCase and snake_case are several words;
    - more than `mixed_words` words mix two scripts that are not written together, or letters of
      more than `most_scripts` scripts occur.

    With the defaults, nothing is found in the demonstrations of BFCL's tasks and almost nothing in
    ordinary English (docs/rewards.md). Raises ValueError for thresholds that would flag any text.
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
        """Return what is wrong with an episode's texts, one text per turn; nothing if all is
        well."""
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
    """Replaces the reward of an episode by `penalty` if the policy itself writes one of `marks`,
    with which the results of tools begin and end. Case does not matter."""

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
    """Return the shortest piece of at most `longest_piece` items that occurs at least `repeats`
    times in a row, over at least `least` items; empty if there is none. A piece of a text must
    contain a letter or a digit, so lines of dashes do not count.

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
    """Return the script of a letter; "" for Greek, as in formulas, and for signs."""
    name = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if name in _WRITTEN_TOGETHER else name if name in _SCRIPTS else ""
