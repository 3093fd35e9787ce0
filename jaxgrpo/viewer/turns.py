"""A conversation laid out: the policy's turns in pieces, the calls of each, two of them beside
each other. Pure."""

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence

from jaxgrpo.viewer.episode import Call, Episode, Message

_PIECES = re.compile(r"<(reasoning|think|tool|tool_call)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
MOST_COMPARED = 3000
"""Words of a text in which differences are looked for; longer ones are shown unmarked."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a call, its value as JSON."""

    name: str
    value: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """A call that the policy wrote: with `made`, what became of it; without, it was not carried
    out. A text that is no call has `name` "" and stands in `raw`."""

    name: str
    arguments: tuple[Argument, ...] = ()
    raw: str = ""
    made: Call | None = None

    @property
    def signature(self) -> str:
        """The call in one line: `ls(a=true)`."""
        given = ", ".join(f"{each.name}={each.value}" for each in self.arguments)
        return f"{self.name}({given or self.raw})" if self.name else self.raw


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of what the policy said: `kind` is "reasoning", "calls" or "text"; `open` marks a
    tag that was not closed."""

    kind: str
    text: str
    calls: tuple[Asked, ...] = ()
    open: bool = False


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of the policy and what came back before its next one."""

    number: int
    said: str
    pieces: tuple[Piece, ...]
    answers: tuple[Message, ...]

    @property
    def calls(self) -> tuple[Asked, ...]:
        return tuple(call for piece in self.pieces for call in piece.calls)


def turns(episode: Episode) -> list[Turn]:
    """The turns of an episode, with the calls that the environment saw given to the turns that
    asked for them, in order and by name. Calls that no turn's text asks for stand in a piece of
    their own in the last turn."""
    blocks: list[tuple[str, list[Message]]] = []
    for message in episode.conversation:
        if message.role == "assistant" or not blocks:
            blocks.append((message.content if message.role == "assistant" else "", []))
        if message.role != "assistant":
            blocks[-1][1].append(message)
    waiting = list(episode.calls)
    found = [
        Turn(n, said, _pieces(said, waiting), tuple(answers))
        for n, (said, answers) in enumerate(blocks, 1)
    ]
    if waiting:
        left = Piece("calls", "", tuple(from_call(call) for call in waiting))
        last = found.pop() if found else Turn(1, "", (), ())
        found.append(dataclasses.replace(last, pieces=(*last.pieces, left)))
    return found


def from_call(call: Call) -> Asked:
    """A call that the environment saw."""
    arguments, raw = _arguments(call.arguments)
    return Asked(call.name, arguments, raw, call)


def _pieces(said: str, waiting: list[Call]) -> tuple[Piece, ...]:
    pieces, place = [], 0
    for found in _PIECES.finditer(said):
        if before := said[place : found.start()].strip():
            pieces.append(Piece("text", before))
        tag, body = found.groups()
        opened = not found.group().endswith(f"</{tag}>")
        if tag in ("tool", "tool_call"):
            pieces.append(Piece("calls", body, _asked(body, waiting), opened))
        else:
            pieces.append(Piece("reasoning", body.strip(), open=opened))
        place = found.end()
    if after := said[place:].strip():
        pieces.append(Piece("text", after))
    return tuple(pieces)


def _asked(body: str, waiting: list[Call]) -> tuple[Asked, ...]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return (Asked("", raw=body.strip()),)
    asked = []
    for each in value if isinstance(value, list) else [value]:
        name = each.get("name") if isinstance(each, dict) else None
        if not isinstance(each, dict) or not isinstance(name, str):
            asked.append(Asked("", raw=json.dumps(each, ensure_ascii=False)))
            continue
        arguments, raw = _arguments(json.dumps(each.get("args", each.get("arguments"))))
        made = waiting.pop(0) if waiting and waiting[0].name == name else None
        asked.append(Asked(name, arguments, raw, made))
    return tuple(asked)


def _arguments(given: str) -> tuple[tuple[Argument, ...], str]:
    """Named arguments, or the text itself where it is no JSON object."""
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return (), given
    if not isinstance(value, dict):
        return (), "" if value is None else given
    return tuple(
        Argument(name, json.dumps(each, ensure_ascii=False)) for name, each in value.items()
    ), ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a text, and whether the other text differs there."""

    text: str
    changed: bool


def differences(left: str, right: str) -> tuple[list[Part], list[Part]]:
    """Both texts in parts, word by word."""
    longest = max(len(left), len(right))
    if left == right or longest > 20 * MOST_COMPARED:
        return [Part(left, False)], [Part(right, False)]
    a, b = _WORDS.findall(left), _WORDS.findall(right)
    if len(a) > MOST_COMPARED or len(b) > MOST_COMPARED:
        return [Part(left, False)], [Part(right, False)]
    mine, others = [], []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if j > i:
            mine.append(Part("".join(a[i:j]), tag != "equal"))
        if m > k:
            others.append(Part("".join(b[k:m]), tag != "equal"))
    return mine, others


@dataclasses.dataclass(frozen=True)
class Pair:
    """The turns of one number on both sides; a side that ended before has none. `same` when
    nothing differs, `same_calls` when the calls and their results do not."""

    left: Turn | None
    right: Turn | None

    @property
    def same(self) -> bool:
        return (
            self.left is not None
            and self.right is not None
            and (self.left.said, self.left.answers) == (self.right.said, self.right.answers)
        )

    @property
    def same_calls(self) -> bool:
        return (
            self.left is not None and self.right is not None and self.left.calls == self.right.calls
        )


def aligned(left: Sequence[Turn], right: Sequence[Turn]) -> list[Pair]:
    """Both sides' turns by their numbers."""
    longest = max(len(left), len(right))
    return [
        Pair(left[n] if n < len(left) else None, right[n] if n < len(right) else None)
        for n in range(longest)
    ]


_DIFFERENCE = re.compile(
    r"^(?P<where>[^:]*): (?P<actual>.*), expected (?P<expected>.*)$", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found: `where`, and either actual and expected, or a note in words."""

    where: str
    actual: str = ""
    expected: str = ""
    note: str = ""


def findings(episode: Episode) -> list[Finding]:
    """The verdict in rows: of the `check` record where there is one, and of the score's notes."""
    rows = []
    for each in episode.check.get("differences") or ():
        if isinstance(each, dict):
            where = [str(each[key]) for key in ("check", "where") if each.get(key)]
            rows.append(
                Finding(
                    ": ".join(where),
                    str(each.get("actual", "")),
                    str(each.get("expected", "")),
                )
            )
    for name, note in episode.notes.items():
        for part in note.split("; "):
            if name.endswith(("missing results", "missing calls")):
                rows.append(Finding(name, "(missing)", part))
                continue
            found = _DIFFERENCE.match(part)
            if found and found["where"] != "value":
                rows.append(
                    Finding(f"{name}: {found['where']}", found["actual"], found["expected"])
                )
            elif found:
                rows.append(Finding(name, found["actual"], found["expected"]))
            else:
                rows.append(Finding(name, note=part))
    return rows
