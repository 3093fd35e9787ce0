"""Tasks by steps: which are solved when, what was gained and lost. Pure."""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from jaxgrpo.viewer.queries import Cell

COLUMNS = 30
"""Steps that fit beside each other; more are put together."""

SOLVED = {
    "always": "always solved",
    "never": "never solved",
    "sometimes": "sometimes solved",
    "gained": "newly solved",
    "lost": "newly lost",
}
SORTS = {
    "change": "change",
    "worst": "fell most",
    "rate": "pass rate",
    "hardest": "hardest first",
    "name": "name",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """Steps `first` to `last`, shown as one column."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A task: its cells by column (None where it was not played), all its episodes, and by how
    much its pass rate rose from its first column to its last."""

    task: str
    cells: Sequence[Cell | None]
    whole: Cell
    change: float
    kind: str


def columns(steps: Sequence[int], most: int = COLUMNS) -> list[Column]:
    """At most `most` columns of about as many steps each."""
    each = -(-len(steps) // most) if steps else 1
    groups = [steps[start : start + each] for start in range(0, len(steps), each)]
    return [Column(group[0], group[-1]) for group in groups]


def row(task: str, by_step: Mapping[int, Cell], over: Sequence[Column]) -> Row:
    """The row of a task, of its cells by step, over these columns, which hold all its steps."""
    found: list[list[Cell]] = [[] for _ in over]
    ends = [column.last for column in over]
    for step, cell in by_step.items():
        found[bisect.bisect_left(ends, step)].append(cell)
    cells = [_together(some) for some in found]
    known = [cell for cell in cells if cell and cell.n]
    whole = _together(known) or Cell(0, 0, None)
    change = known[-1].rate - known[0].rate if known else 0.0
    return Row(task, cells, whole, change, kind(known))


def kind(known: Sequence[Cell]) -> str:
    """Of a task's columns in order: always or never solved; newly solved when the first has none
    passed and the last has, newly lost the other way round; else sometimes."""
    if not known or not any(cell.passed for cell in known):
        return "never"
    if all(cell.passed == cell.n for cell in known):
        return "always"
    if not known[0].passed and known[-1].passed:
        return "gained"
    return "lost" if known[0].passed and not known[-1].passed else "sometimes"


def ordered(rows: Sequence[Row], sort: str) -> list[Row]:
    keys = {
        "worst": lambda r: (r.change, r.task),
        "rate": lambda r: (-r.whole.rate, r.task),
        "hardest": lambda r: (r.whole.rate, r.task),
        "name": lambda r: natural(r.task),
    }
    return sorted(rows, key=keys.get(sort, lambda r: (-r.change, r.task)))


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that puts `task_9` before `task_10`."""
    parts, digits = [], ""
    for char in name + "\0":
        if char in "0123456789":
            digits += char
            continue
        if digits:
            parts.append((0, int(digits[:18]), digits))
            digits = ""
        parts.append((1, 0, char))
    return parts


def _together(cells: Sequence[Cell]) -> Cell | None:
    if not cells:
        return None
    n = sum(cell.n for cell in cells)
    known = [(cell.reward, cell.n) for cell in cells if cell.reward is not None]
    reward = sum(r * k for r, k in known) / sum(k for _, k in known) if known else None
    return Cell(n, sum(cell.passed for cell in cells), reward)
