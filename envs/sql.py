"""Answer questions about small databases with SQL: an environment made from one typed function.

The last query that ran is the answer. Its rows must be those that the question asks for, in the
database that the policy sees and in a second one with other rows. Queries may only read. SQLite
ends them after `MAX_OPERATIONS` operations. A time limit would make the reward depend on how busy
the machine is. Tasks are in envs/sql_tasks.py.
"""

import contextlib
import dataclasses
import sqlite3

from jaxgrpo.envs.sql_tasks import REFUSALS, Rows, SqlTask, SqlTasks, task_of
from jaxgrpo.toolkit.environment import ToolEnvironment
from jaxgrpo.types import Score, Task

READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
FUNCTIONS = ("count", "sum", "total", "avg", "min", "max", "round", "abs", "lower", "upper", "like")
MAX_ROWS, MAX_CHARS, MAX_OPERATIONS = 50, 2_000, 500_000


@dataclasses.dataclass(frozen=True)
class Sql(SqlTasks):
    """The suite: the tasks, and an episode for each."""

    def create(self, task: Task) -> "SqlEpisode":
        return SqlEpisode(task_of(task), self.protocol)


@dataclasses.dataclass
class SqlEpisode(ToolEnvironment):
    """One question. The state is the last query that ran."""

    task: SqlTask
    protocol: str = "native"
    answer: str = ""
    tool_errors = REFUSALS

    def first_message(self) -> str:
        return f"Tables: {self.task.tables}\n{self.task.question}"

    def query(self, sql: str) -> Rows:
        """Run a SELECT query and see its rows. Your last query is your answer.

        Args:
            sql: The query.
        """
        rows, self.answer = run(sql, self.task.databases[0]), sql
        return rows

    def score(self) -> Score:
        passed = self.task.is_answered(lambda database: run(self.answer, database))
        return Score(float(passed), passed)


def run(sql: str, script: str) -> Rows:
    """Return the first rows of a query over the database that a script makes. Raises one of
    REFUSALS if it fails, or does more than it may."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(script)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CHARS)
        database.set_authorizer(authorize)
        database.set_progress_handler(lambda: 1, MAX_OPERATIONS)
        return database.execute(sql).fetchmany(MAX_ROWS)


def authorize(action: int, one: str | None, name: str | None, *_: str | None) -> int:
    """Return SQLite's 0 for what a query may do, and 1 for anything else."""
    calls = action == sqlite3.SQLITE_FUNCTION and name in FUNCTIONS
    return int(action not in READS and not calls)
