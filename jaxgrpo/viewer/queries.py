"""What the pages ask of a run's index."""

import dataclasses
import sqlite3
from collections.abc import Mapping, Sequence

from jaxgrpo.run.paired import Tally
from jaxgrpo.viewer.filters import Filter

COUNTED = 10_000
"""Hits are counted up to here."""


_ATTEMPT = """(
    SELECT count(*) FROM episodes o
    WHERE o.split = e.split AND o.step = e.step AND o.task = e.task AND o.sample = e.sample
    AND (o.reward IS NULL, o.id) < (e.reward IS NULL, e.id)
) AS attempt"""
"""Which one of several episodes of one place: what has a reward comes first, in the order of the
file. An episode that its environment failed is recorded beside the one that replaced it."""


@dataclasses.dataclass(frozen=True)
class Hits:
    """One page of episodes; `total` is at most `COUNTED` + 1, which stands for more."""

    rows: Sequence[sqlite3.Row]
    total: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task at a step: how many episodes, how many passed, their mean reward."""

    n: int
    passed: int
    reward: float | None

    @property
    def rate(self) -> float:
        return self.passed / self.n if self.n else 0.0


def episodes(db: sqlite3.Connection, wanted: Filter, offset: int, size: int) -> Hits:
    where, values = wanted.where()
    ids = db.execute(
        f"SELECT id FROM episodes WHERE {where} ORDER BY {wanted.order} LIMIT ? OFFSET ?",
        (*values, size, offset),
    ).fetchall()
    marks = ",".join("?" * len(ids))
    found = db.execute(
        f"SELECT *, {_ATTEMPT} FROM episodes e WHERE id IN ({marks})", [row["id"] for row in ids]
    ).fetchall()
    by_id = {row["id"]: row for row in found}
    counted = db.execute(
        f"SELECT count(*) FROM (SELECT 1 FROM episodes WHERE {where} LIMIT ?)",
        (*values, COUNTED + 1),
    ).fetchone()[0]
    return Hits([by_id[row["id"]] for row in ids], counted)


def episode(
    db: sqlite3.Connection, split: str, step: int, task: str, sample: int, attempt: int = 0
) -> sqlite3.Row | None:
    """An episode by its place. Where one was played again, `attempt` tells them apart."""
    found: sqlite3.Row | None = db.execute(
        f"SELECT *, {_ATTEMPT} FROM episodes e WHERE split = ? AND step = ? AND task = ?"
        " AND sample = ? ORDER BY attempt LIMIT 1 OFFSET ?",
        (split, step, task, sample, attempt),
    ).fetchone()
    return found


def group(db: sqlite3.Connection, split: str, step: int, task: str) -> list[sqlite3.Row]:
    """The episodes of a task at a step."""
    return db.execute(
        f"SELECT *, {_ATTEMPT} FROM episodes e WHERE split = ? AND step = ? AND task = ?"
        " ORDER BY sample, attempt",
        (split, step, task),
    ).fetchall()


def splits(db: sqlite3.Connection) -> dict[str, list[int]]:
    """The steps of each split that have episodes."""
    found: dict[str, list[int]] = {}
    for row in db.execute("SELECT DISTINCT split, step FROM kinds ORDER BY split, step"):
        found.setdefault(row["split"], []).append(row["step"])
    return found


def totals(db: sqlite3.Connection) -> dict[str, int]:
    row = db.execute(
        "SELECT total(n), count(DISTINCT step), count(DISTINCT split) FROM kinds"
    ).fetchone()
    tasks = db.execute("SELECT count(*) FROM tasks").fetchone()[0]
    return {"episodes": int(row[0]), "steps": row[1], "tasks": tasks}


def faults(db: sqlite3.Connection) -> list[tuple[str, str]]:
    """What could not be read: the file and what is wrong with it."""
    found = [
        (row["name"], row["fault"])
        for row in db.execute("SELECT name, fault FROM files WHERE fault != '' ORDER BY name")
    ]
    metrics = db.execute("SELECT value FROM state WHERE key = 'metrics_fault'").fetchone()
    return [*found, *([("metrics.jsonl", metrics[0])] if metrics and metrics[0] else [])]


def history(db: sqlite3.Connection, task: str) -> dict[str, dict[int, Cell]]:
    """A task's cells, by split and step."""
    found: dict[str, dict[int, Cell]] = {}
    for row in db.execute(
        "SELECT split, step, n, passed, reward FROM cells WHERE task = ? ORDER BY split, step",
        (task,),
    ):
        found.setdefault(row["split"], {})[row["step"]] = Cell(
            row["n"], row["passed"], row["reward"]
        )
    return found


def cells(db: sqlite3.Connection, split: str) -> dict[str, dict[int, Cell]]:
    """All tasks' cells of a split, by task and step."""
    found: dict[str, dict[int, Cell]] = {}
    for row in db.execute(
        "SELECT task, step, n, passed, reward FROM cells WHERE split = ? ORDER BY task, step",
        (split,),
    ):
        found.setdefault(row["task"], {})[row["step"]] = Cell(
            row["n"], row["passed"], row["reward"]
        )
    return found


def evaluation(db: sqlite3.Connection, split: str, step: int) -> dict[str, Cell]:
    """The tasks of one step, by id."""
    found = db.execute(
        "SELECT task, n, passed, reward FROM cells WHERE split = ? AND step = ?", (split, step)
    )
    return {row["task"]: Cell(row["n"], row["passed"], row["reward"]) for row in found}


def tallies(cells: Mapping[str, Cell]) -> dict[str, Tally]:
    """How many episodes of each task passed."""
    return {task: Tally(cell.passed, cell.n) for task, cell in cells.items()}


def tasks(db: sqlite3.Connection) -> dict[str, sqlite3.Row]:
    return {row["task"]: row for row in db.execute("SELECT * FROM tasks")}


def labels(db: sqlite3.Connection) -> list[str]:
    found = {
        label
        for row in db.execute("SELECT DISTINCT labels FROM tasks")
        for label in row["labels"].split(",")
    }
    return sorted(found - {""})


def choices(db: sqlite3.Connection) -> Mapping[str, list[str]]:
    """What the filters can be set to, of what is there."""
    return {
        "split": list(splits(db)),
        "label": labels(db),
        "stop": _distinct(db, "stop_reason"),
        "failure": _distinct(db, "failure"),
        "tool": _tools(db),
    }


def _distinct(db: sqlite3.Connection, column: str) -> list[str]:
    """The values of an indexed column. Each is found by a jump in the index, without a scan."""
    found, last = list[str](), ""
    while (
        row := db.execute(
            f"SELECT {column} FROM episodes WHERE {column} > ? ORDER BY {column} LIMIT 1", (last,)
        ).fetchone()
    ) is not None:
        last = row[0]
        found.append(last)
    return found


def _tools(db: sqlite3.Connection) -> list[str]:
    """Tools of the last episodes; more can be typed."""
    recent = db.execute("SELECT tools FROM episodes ORDER BY id DESC LIMIT 3000")
    return sorted({tool for row in recent for tool in row["tools"].split(",")} - {""})


def kinds(db: sqlite3.Connection, split: str) -> dict[int, dict[str, int]]:
    """How many episodes of each failure ("" is passed), by step."""
    found: dict[int, dict[str, int]] = {}
    for row in db.execute(
        "SELECT step, failure, n FROM kinds WHERE split = ? ORDER BY step", (split,)
    ):
        found.setdefault(row["step"], {})[row["failure"]] = row["n"]
    return found


def series(db: sqlite3.Connection, key: str, split: str = "") -> list[tuple[int, float | None]]:
    """A metric against steps; None where it was not finite."""
    found = db.execute(
        "SELECT step, value FROM metrics WHERE key = ? AND split = ? ORDER BY step", (key, split)
    )
    return [(row["step"], row["value"]) for row in found]


def metric_keys(db: sqlite3.Connection) -> list[tuple[str, str]]:
    """The metrics that are there, as (split, key)."""
    return [
        (row["split"], row["key"])
        for row in db.execute("SELECT DISTINCT split, key FROM metrics ORDER BY split, key")
    ]
