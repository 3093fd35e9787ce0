"""The context of a unit, and the file of figures. Needs only Python."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FIGURES = "figures.jsonl"


@dataclasses.dataclass(frozen=True)
class Context:
    """The context of a unit.

    out        the folder of the figures
    deadline   time, by `time.monotonic`, after which no row is started
    scratch    a folder, in shared memory if possible, that is removed after the unit
    tiny       use sizes for a CPU
    bfcl       an unpacked bfcl_eval
    """

    out: Path
    deadline: float
    scratch: Path
    tiny: bool = False
    bfcl: str | None = None

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


def add(out: Path, row: Row) -> None:
    """Append a row to the figures on disk, in one write, so that a killed process leaves no part of
    a line."""
    line = json.dumps(_plain(row), allow_nan=False) + "\n"
    file = os.open(out / FIGURES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(out: Path) -> list[Row]:
    """Read the rows so far, without lines that a full disk has cut short."""
    path, found = out / FIGURES, []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _plain(value: Any) -> Any:
    """Replace numbers that are not finite by their names, because JSON has none."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def last_line(log: Path) -> str:
    """Return the last line of a log, at most 300 characters."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


def in_time(context: Context, rows: Iterator[Row], what: Row) -> Iterator[Row]:
    """Yield the rows, or a row that says that no time was left to start."""
    if context.left() > 0:
        yield from rows
    else:
        yield {**what, "row": "left out", "why": "no time left"}
