"""A record file's lines as rows of the index. It is what costs time when indexing, so it can run
in a process of its own."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgrpo.viewer.episode import Episode, from_fields
from jaxgrpo.viewer.failures import failure, repetition, truth_calls
from jaxgrpo.viewer.reader import KNOWN_FORMAT, Line, Lines, head
from jaxgrpo.viewer.truth import ground_truths

MOST_WORDS = 200_000
"""Characters of an episode that can be searched; what is beyond is shown, not found."""


@dataclasses.dataclass(frozen=True)
class FileRows:
    """What was read of a file: a row an episode, the words to search by, the tasks met; where
    reading ended and what could not be read."""

    rows: list[tuple[Any, ...]]
    words: list[str]
    tasks: dict[str, tuple[str, int | None, str]]
    done: int
    fault: str


def read_rows(path: Path, start: int = 0) -> FileRows:
    """The rows of the lines of a file, RUN/trajectories/NAME, from `start` on. Lines that are no
    episodes are counted and left out."""
    rows, words, tasks, faults = [], [], {}, []
    truths = ground_truths(path.parent.parent)
    lines = Lines(path, start)
    for number, line in enumerate(lines, 1):
        try:
            fields, tokens = head(line.data)
        except ValueError as error:
            faults.append(f"line {number} is not an episode: {error}")
            continue
        if "task" not in fields:
            faults.append(f"line {number} names no task")
            continue
        episode = from_fields(fields, truths)
        if episode.format != KNOWN_FORMAT:
            faults.append(
                f"line {number} has format {episode.format!r}; this viewer knows {KNOWN_FORMAT}"
            )
        rows.append(_row(line, episode, tokens))
        words.append(searched(episode))
        truth = len(truth_calls(episode.truth)) if isinstance(episode.truth, list) else None
        tasks[episode.task] = (",".join(episode.labels), truth, _short(episode.query, 2000))
    if lines.fault:
        faults.append(lines.fault)
    fault = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
    return FileRows(rows, words, tasks, lines.end, fault)


def searched(episode: Episode) -> str:
    """The text by which an episode is found: what was said from the policy's first turn on, errors
    and notes, the request, the task's id. The tools' documents are left out: they would find every
    episode. The request comes late, because a snippet shows the first hit: it is the same for all
    samples."""
    said = [message.content for message in episode.conversation]
    if not episode.conversation:  # an older or bare record: the calls are all there is
        said += [f"{call.name} {call.arguments} {call.result}" for call in episode.calls]
    about = [episode.error, *episode.notes.values(), episode.query, episode.task]
    words = f"{_cut(said, MOST_WORDS)}\n{_cut(about, MOST_WORDS // 10)}"
    return words.encode("utf-8", "replace").decode()


def _cut(texts: Sequence[str], most: int) -> str:
    return "\n".join(texts)[:most]


def _row(line: Line, episode: Episode, tokens: int) -> tuple[Any, ...]:
    repeated = repetition(episode.policy_texts)
    tools = dict.fromkeys(_word(call.name) for call in episode.calls)
    said = episode.policy_texts
    return (
        line.offset,
        len(line.data),
        _word(episode.split),
        episode.step,
        _word(episode.task),
        episode.sample,
        f",{','.join(map(_word, episode.labels))},",
        episode.reward,
        episode.passed,
        _word(episode.stop_reason),
        failure(episode, repeated),
        episode.turns,
        tokens,
        len(episode.calls),
        f",{','.join(tools)},",
        episode.advantage,
        repeated,
        json.dumps(episode.parts),
        _short(" ".join(said[0][:1000].split()) if said else episode.error, 160),
    )


def _word(value: str) -> str:
    """A text that SQLite takes: half a surrogate pair is none."""
    return value.encode("utf-8", "replace").decode()


def _short(value: str, most: int) -> str:
    return _word(value[:most])
