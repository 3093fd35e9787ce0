"""What a unit is given, and how its figures are kept. Needs nothing but Python."""

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
    """`out` is the folder of the figures; no row begins after `deadline` (of `time.monotonic`).
    `scratch` is a folder in shared memory, where the machine has that, which goes with the unit.
    `tiny` asks for sizes for a CPU, `bfcl` names an unpacked bfcl_eval."""

    out: Path
    deadline: float
    scratch: Path
    tiny: bool = False
    bfcl: str | None = None

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


def add(out: Path, row: Row) -> None:
    """Append a row to the figures, on the disk when this returns. One write: a process that is
    killed leaves whole lines."""
    line = json.dumps(_plain(row), allow_nan=False) + "\n"
    file = os.open(out / FIGURES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(out: Path) -> list[Row]:
    """The rows so far; a line that a full disk cut short is left out."""
    path, found = out / FIGURES, []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _plain(value: Any) -> Any:
    """JSON has no number that is not finite: such a one is given by its name."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def last_line(log: Path) -> str:
    """What a process said last, at most 300 characters."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


def in_time(context: Context, rows: Iterator[Row], what: Row) -> Iterator[Row]:
    """The rows, or a row that says that there was no time to begin with them."""
    if context.left() > 0:
        yield from rows
    else:
        yield {**what, "row": "left out", "why": "no time left"}
