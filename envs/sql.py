"""Answer questions with SQL, over small databases: an environment made of one typed function.

The last query that ran is the answer. Its rows must equal those of the solution, in any order unless
the question asks for one, in the database that the policy sees and in a second one with other rows.
Queries may only read. They end after `MAX_OPERATIONS` operations of SQLite rather than at a time, so
that a reward does not depend on how busy the machine is.
"""

import contextlib
import dataclasses
import itertools
import sqlite3

from envs.sql_tasks import Question, SqlTask, sql_tasks
from jaxgrpo.toolkit.environment import ToolEnvironment, ToolError
from jaxgrpo.types import Score, Task

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
FUNCTIONS = {
    "count",
    "sum",
    "total",
    "avg",
    "min",
    "max",
    "round",
    "abs",
    "lower",
    "upper",
    "length",
}
MAX_ROWS, MAX_OPERATIONS, MAX_LENGTH = 50, 500_000, 2_000


@dataclasses.dataclass(frozen=True)
class Sql:
    """The suite. `levels` are those of envs/sql_tasks.py, `protocol` is "native" or "tags"."""

    levels: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    train_size: int = 256
    test_size: int = 64
    protocol: str = "native"

    def tasks(self, split: str) -> list[Task]:
        return sql_tasks(split, self.levels, self.test_size if split == "test" else self.train_size)

    def create(self, task: Task) -> "SqlEpisode":
        assert isinstance(task.payload, SqlTask)
        return SqlEpisode(task.payload, self.protocol)


@dataclasses.dataclass
class SqlEpisode(ToolEnvironment):
    """One question. The state is the last query that ran."""

    task: SqlTask
    protocol: str = "native"
    answer: str = ""

    def first_message(self) -> str:
        return f"Tables: {self.task.tables}\n{self.task.question.text}"

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Run a SELECT query and see its rows. Your last query is your answer.

        Args:
            sql: The query.
        """
        rows, self.answer = run(sql, self.task.scripts[0]), sql
        return rows

    def score(self) -> Score:
        asked = self.task.question
        passed = all(_right(self.answer, asked, script) for script in self.task.scripts)
        return Score(float(passed), passed)


def _right(answer: str, asked: Question, script: str) -> bool:
    """Whether the answer gives the solution's rows; numbers are compared to six digits."""
    try:
        given, wanted = (
            [[f"{v:.6g}" if isinstance(v, int | float) else v for v in row] for row in rows]
            for rows in (run(answer, script), run(asked.solution, script))
        )
    except ToolError:
        return False
    return given == wanted if asked.ordered else sorted(given, key=str) == sorted(wanted, key=str)


def run(sql: str, script: str) -> list[tuple[object, ...]]:
    """Return the rows of a query. Raises ToolError if it fails, or does more than it may."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(script)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_LENGTH)
        database.set_authorizer(_authorize)
        database.set_progress_handler(itertools.count(1).__next__, MAX_OPERATIONS)
        try:
            rows = database.execute(sql).fetchmany(MAX_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ToolError(str(error).replace("interrupted", "the query takes too long")) from None
    if len(rows) > MAX_ROWS:
        raise ToolError(f"the query returns more than {MAX_ROWS} rows")
    return rows


def _authorize(action: int, one: str | None, two: str | None, *_: str | None) -> int:
    allowed = action in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and two in FUNCTIONS)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY
