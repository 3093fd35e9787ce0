"""The ground truth of a run's tasks, from `ground_truth.jsonl` in its folder."""

import functools
from collections.abc import Mapping
from pathlib import Path

from jaxgrpo.viewer.reader import parsed, text

FILE = "ground_truth.jsonl"


def ground_truths(run: Path) -> Mapping[str, object]:
    """The ground truth of each task by its id, as it is recorded: a list of calls, or a text. None
    of a run without the file; lines that cannot be read are left out."""
    stamp = stamp_of(run)
    return _read(run / FILE, stamp) if stamp else {}


def stamp_of(run: Path) -> str:
    """What changes when the file does; "" where there is none, or where it is a link out of the
    run's folder."""
    file = run / FILE
    try:
        if not file.resolve().is_relative_to(run.resolve()):
            return ""
        stat = file.stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


@functools.lru_cache(maxsize=8)
def _read(file: Path, stamp: str) -> Mapping[str, object]:
    found = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            fields = parsed(line)
        except ValueError:
            continue
        if "task" in fields:
            found[text(fields["task"])] = fields.get("ground_truth")
    return found
