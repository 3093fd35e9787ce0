"""Read and write trajectories as JSON lines, one episode per line; gzipped if the name ends in .gz.

Reading returns what was written, log-probabilities to the last bit. `write_records` replaces a file
as a whole, and `append_records` extends it. Reading skips and reports a last line that a killed
process left incomplete.
"""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.types import Difference, Message, Score, StopReason, ToolCall, Trajectory

FORMAT = 1
"""The version of the line format. It grows when older readers could misread a line."""
_SHOWN = 2000
_LISTS, _LAST = ',"prompt_ids":[', ',"weight_versions":['


@dataclasses.dataclass(frozen=True)
class TrajectoryRecord:
    """A trajectory with its split, the step of the batch or evaluation, and its task's labels."""

    trajectory: Trajectory
    split: str
    step: int
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EpisodeFigures:
    """What the update computed of one trained episode, as its record holds it.

    `tokens` maps a key of the record to a value for each completion token (0 if not sampled, None
    if not finite), or to one number that all sampled tokens share.
    """

    advantage: float
    tokens: Mapping[str, Sequence[float | None] | float]


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """The complete records of a file. `torn` describes an incomplete end, "" if there is none."""

    records: tuple[TrajectoryRecord, ...]
    torn: str = ""


def write(path: Path, result: RolloutResult, split: str, step: int) -> list[str]:
    """Write the episodes of a rollout: those of its groups, then those that ended with an error of
    the environment. Return one line for each episode of which a part cannot be written."""
    lines, faults = to_lines(result, split, step)
    write_lines(path, lines)
    return faults


def write_evaluation(folder: Path, result: RolloutResult, name: str, step: int) -> list[str]:
    """Write the episodes of an evaluation into a folder of records, as `write` does. Do this before
    its metrics are recorded, so that a line of metrics always has its episodes."""
    kind = f"eval-{name}"
    return write(folder / f"{kind}-{step:06d}.jsonl.gz", result, kind, step)


def to_lines(result: RolloutResult, split: str, step: int) -> tuple[list[str], list[str]]:
    """Return a rollout's episodes as lines, and one line for each episode of which a part cannot be
    written because of a value that its environment gave."""
    tasks = [group.task for group in result.groups] + [dropped.task for dropped in result.dropped]
    labels = {task.id: task.labels for task in tasks}
    trajectories = [trajectory for group in result.groups for trajectory in group.trajectories]
    lines, faults = [], []
    for t in [*trajectories, *result.failures]:
        record = TrajectoryRecord(t, split, step, labels[t.task_id])
        try:
            lines.append(to_line(record))
        except Exception as error:  # the edge to a user's environment: it gave calls and scores
            why = f"{type(error).__name__}: {_shown(str, error)}"
            faults.append(f"an episode of task {t.task_id!r} cannot be recorded: {why}")
            lines.append(to_line(_without_given_values(record, faults[-1])))
    return lines, faults


def _without_given_values(record: TrajectoryRecord, fault: str) -> TrajectoryRecord:
    """Keep the tokens of an episode, and describe its score and calls in its error text."""
    t = record.trajectory
    score, calls = _shown(repr, t.score), _shown(repr, t.calls)
    error = f"{fault}; it ended as {t.stop_reason}, its score was {score}, its calls were {calls}"
    bare = dataclasses.replace(
        t, messages=(), calls=(), score=None, stop_reason=StopReason.ENVIRONMENT_ERROR, error=error
    )
    return dataclasses.replace(record, trajectory=bare, labels=())


def _shown(how: Callable[[Any], str], value: Any) -> str:
    try:
        return how(value)[:_SHOWN]
    except Exception:  # the edge to a user's environment
        return f"(a {type(value).__name__} that cannot be shown)"


def write_records(path: Path, records: Iterable[TrajectoryRecord]) -> None:
    """Replace a file as a whole. A step that runs again after a resume replaces its own file."""
    write_lines(path, map(to_line, records))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a file as a whole by these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    data = "".join(f"{line}\n" for line in lines).encode("ascii")
    with unfinished.open("wb") as file:
        file.write(gzip.compress(data, compresslevel=6, mtime=0) if path.suffix == ".gz" else data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def clear_unfinished(folder: Path) -> None:
    """Remove the unfinished files of killed processes. No process may be writing to the folder."""
    for path in folder.glob(".*.jsonl*"):
        if path.name.rpartition(".")[2].isdecimal():
            path.unlink(missing_ok=True)


def remove_later(folder: Path, step: int) -> None:
    """Remove the episodes of batches and evaluations after `step`."""
    for path in (*folder.glob("train-*.jsonl.gz"), *folder.glob("eval-*.jsonl.gz")):
        digits = path.name.removesuffix(".jsonl.gz").rpartition("-")[2]
        if digits.isdecimal() and int(digits) > step:
            path.unlink()


def append_records(path: Path, records: Iterable[TrajectoryRecord]) -> None:
    """Append to a plain file, after removing an incomplete last line."""
    if path.suffix == ".gz":
        raise ValueError(
            f"cannot append to {path}: gzipped files are written whole, with write_records"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{to_line(record)}\n" for record in records).encode("ascii")
    with path.open("ab+") as file:
        file.truncate(_whole_lines(file, file.seek(0, os.SEEK_END)))
        file.write(data)


def read_records(path: Path) -> RecordFile:
    """Read a plain or gzipped file. Raises ValueError if a line other than an incomplete last one
    is damaged, or if the format version is another one."""
    data, torn = _read_bytes(path)
    *lines, rest = data.split(b"\n")
    if rest:
        torn = torn or f"{path}: the last line is torn after {len(rest)} bytes; it is left out"
    return RecordFile(tuple(_parsed(path, lines)), torn)


def to_line(record: TrajectoryRecord) -> str:
    """Return one line of JSON, ASCII only: lone surrogates in a tool's result survive as
    escapes."""
    trajectory = record.trajectory
    score = trajectory.score
    fields = {
        "format": FORMAT,
        "task": trajectory.task_id,
        "labels": record.labels,
        "split": record.split,
        "step": record.step,
        "sample": trajectory.sample_index,
        "stop_reason": trajectory.stop_reason.value,
        "turns": trajectory.turns,
        "reward": None if score is None else float(score.reward),
        "passed": None if score is None else bool(score.passed),
        "score_parts": None
        if score is None
        else {name: float(part) for name, part in score.parts.items()},
        "score_notes": None if score is None else dict(score.notes),
        "error": trajectory.error,
        "messages": [dataclasses.asdict(message) for message in trajectory.messages],
        "calls": [dataclasses.asdict(call) for call in trajectory.calls],
        **_check(score),
        "prompt_ids": trajectory.prompt_ids_P.tolist(),
        "completion_ids": trajectory.completion_ids_C.tolist(),
        "sampled": trajectory.action_mask_C.astype(int).tolist(),
        "sampler_logprobs": _shortest(trajectory.sampler_logprobs_C),
        "weight_versions": trajectory.weight_versions_C.tolist(),
    }
    return _dumps(fields)


def _check(score: Score | None) -> dict[str, Any]:
    """Return the differences that the check found, under the key `check`, if there are any."""
    if score is None or not score.differences:
        return {}
    return {"check": {"differences": [dataclasses.asdict(each) for each in score.differences]}}


def with_figures(line: str, figures: EpisodeFigures) -> str:
    """Return an episode's line with its figures.

    The advantage comes before the token lists, which a reader need not parse, and the figures of
    tokens among them."""
    # Quotes within a text are escaped, and parts and notes of that name are no lists.
    head, lists = line.split(_LISTS, 1)
    lists, versions = lists.rsplit(_LAST, 1)
    advantage, tokens = _dumps({"advantage": figures.advantage}), _dumps(dict(figures.tokens))
    return f"{head},{advantage[1:-1]}{_LISTS}{lists},{tokens[1:-1]}{_LAST}{versions}"


def _dumps(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)


def from_line(line: str | bytes) -> TrajectoryRecord:
    """Parse one line. Raises ValueError for another format version, KeyError for a missing key."""
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(
            f"the line has format {found!r}, this program reads format {FORMAT}: read it with the "
            "version that wrote it"
        )
    trajectory = Trajectory(
        task_id=fields["task"],
        sample_index=fields["sample"],
        prompt_ids_P=np.array(fields["prompt_ids"], np.int32),
        completion_ids_C=np.array(fields["completion_ids"], np.int32),
        action_mask_C=np.array(fields["sampled"], bool),
        sampler_logprobs_C=np.array(fields["sampler_logprobs"], np.float64).astype(np.float32),
        weight_versions_C=np.array(fields["weight_versions"], np.int32),
        messages=tuple(Message(**message) for message in fields["messages"]),
        calls=tuple(ToolCall(**call) for call in fields["calls"]),
        turns=fields["turns"],
        stop_reason=StopReason(fields["stop_reason"]),
        score=_score(fields),
        error=fields["error"],
    )
    return TrajectoryRecord(trajectory, fields["split"], fields["step"], tuple(fields["labels"]))


def _score(fields: Mapping[str, Any]) -> Score | None:
    if fields["reward"] is None:
        return None
    found = (fields.get("check") or {}).get("differences", ())
    return Score(
        fields["reward"],
        fields["passed"],
        fields["score_parts"],
        fields["score_notes"],
        tuple(Difference(**each) for each in found),
    )


def _shortest(values_T: np.ndarray) -> list[float]:
    """Return the floats with the shortest text that round to these float32 values: -0.1 instead of
    -0.10000000149011612."""
    exact_T = values_T.astype(np.float64)
    short_T = values_T.astype(np.float32).astype(str).astype(np.float64)
    values: list[float] = np.where(
        short_T.astype(np.float32) == values_T, short_T, exact_T
    ).tolist()
    return values


def _whole_lines(file: Any, size: int) -> int:
    """Return where the last complete line of a file of `size` bytes ends."""
    block = 1 << 16
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline: int = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _read_bytes(path: Path) -> tuple[bytes, str]:
    """Return the uncompressed bytes; of a gzipped file that ends too early, the readable part."""
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data, ""
    text = b""
    while data:  # one gzip member at a time: concatenated files are one file
        inflate = zlib.decompressobj(wbits=31)
        try:
            text += inflate.decompress(data)
        except zlib.error as error:
            raise ValueError(f"{path} is not a gzip file, or it is damaged: {error}") from error
        if not inflate.eof:
            return (
                text,
                f"{path}: the gzipped data end too early; their whole lines up to there were read",
            )
        data = inflate.unused_data
    return text, ""


def _parsed(path: Path, lines: Iterable[bytes]) -> Iterator[TrajectoryRecord]:
    for number, line in enumerate(lines, start=1):
        try:
            yield from_line(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is not a trajectory: {type(error).__name__}: {error}"
            ) from error
