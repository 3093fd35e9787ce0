"""Generate questions over small SQLite databases, in six levels of growing difficulty.

| level | asks for | answered by, for example |
|---|---|---|
| 1 | one column | `SELECT name FROM lamps` |
| 2 | rows with a property | `SELECT name FROM lamps WHERE price > 30` |
| 3 | one number about them | `SELECT max(price) FROM lamps WHERE color = 'red'` |
| 4 | the first rows of an order | `SELECT name FROM lamps ORDER BY price DESC LIMIT 3` |
| 5 | one row per group | `SELECT color, count(*) FROM lamps GROUP BY color` |
| 6 | a property in another table | `SELECT lamps.name FROM lamps JOIN makers ON ... WHERE ...` |

The splits have no question in common. Each task has two databases with the same tables and
different rows. The policy sees only the first, and an answer must be right in both, so that a
constant is never right.
"""

import contextlib
import dataclasses
import itertools
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence

from jaxgrpo.toolkit.protocols import protocol_of
from jaxgrpo.types import Task

LEVELS = (1, 2, 3, 4, 5, 6)
TABLES = ("lamps", "chairs", "ropes", "vases", "drums", "kites", "bells", "sleds", "tents", "masks")
NUMBERS = ("price", "weight", "year", "stock")
WORDS = {"color": ("red", "blue", "green", "white"), "size": ("small", "medium", "large")}
CITIES = ("Oslo", "Lima", "Cairo", "Quito")
NAMES = ("Ada", "Bo", "Cleo", "Dag", "Eva", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Lee")
ROWS = 8


Rows = Sequence[tuple[object, ...]]
REFUSALS = (sqlite3.Error, sqlite3.Warning, ValueError)
"""What sqlite3 raises for a query that cannot run."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a table, the query that answers it, and whether rows have an order."""

    level: int
    table: str
    text: str
    solution: str
    ordered: bool = False


@dataclasses.dataclass(frozen=True)
class SqlTask:
    """The payload of a task: a question, the tables that it names, the scripts that make the two
    databases, and the rows that answer it in each."""

    question: str
    tables: str
    solution: str
    ordered: bool
    databases: tuple[str, ...]
    rows: tuple[Rows, ...]

    def is_answered(self, run: Callable[[str], Rows]) -> bool:
        """Whether `run(database)` gives the rows, in each database: in the same order if the
        question asks for one. Numbers are compared to six digits."""
        try:
            answers = [run(database) for database in self.databases]
        except REFUSALS:  # it ran in the first and not in the second
            return False
        given, wanted = (
            [[tuple(map(_value, row)) for row in rows] for rows in every]
            for every in (answers, self.rows)
        )
        if not self.ordered:
            given, wanted = ([sorted(rows) for rows in every] for every in (given, wanted))
        return given == wanted


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else repr(value)


@dataclasses.dataclass(frozen=True)
class SqlTasks:
    """The tasks of a suite: at most `train_size` and `test_size`, the same number of each level. A
    quarter of all questions is held out. `protocol` is that of the policy: "native" or "tags"."""

    levels: tuple[int, ...] = LEVELS
    train_size: int = 256
    test_size: int = 64
    protocol: str = "native"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or not self.levels:
            raise ValueError(f"levels must be any of {LEVELS}, got {self.levels}")
        protocol_of(self.protocol)

    def tasks(self, split: str) -> list[Task]:
        if split not in ("train", "test"):
            raise ValueError(f"no split {split!r}: a split is 'train' or 'test'")
        of_level = [_questions(level, split, self.seed) for level in self.levels]
        mixed = [q for together in itertools.zip_longest(*of_level) for q in together if q]
        chosen = mixed[: self.test_size if split == "test" else self.train_size]
        return [_task(f"sql_{split}_{i}", question, self.seed) for i, question in enumerate(chosen)]

    def demonstration(self, task: Task) -> tuple[str, ...]:
        """Return policy turns that solve the task."""
        protocol, call = protocol_of(self.protocol), {"sql": task_of(task).solution}
        return protocol.write_calls([("query", call)], "I query."), protocol.write_end()

    def ground_truth(self, task: Task) -> str:
        """Return a query that answers the question. Others may too."""
        return task_of(task).solution


def task_of(task: Task) -> SqlTask:
    """Return the payload of a task. Raises TypeError if it belongs to another suite."""
    if not isinstance(task.payload, SqlTask):
        raise TypeError(f"task {task.id!r} does not belong to this suite")
    return task.payload


def _questions(level: int, split: str, seed: int) -> list[Question]:
    every = [question for table in TABLES for question in _LEVEL[level](table)]
    random.Random(f"sql/{seed}/{level}").shuffle(every)
    held_out = len(every) // 4
    return every[:held_out] if split == "test" else every[held_out:]


def _columns(table: str) -> Iterator[Question]:
    """Ask for one column."""
    for column in ("name", *NUMBERS, *WORDS):
        yield Question(
            1, table, f"List the {column} of all {table}.", f"SELECT {column} FROM {table}"
        )


def _comparisons(table: str) -> Iterator[Question]:
    """Ask for the rows on one side of a bound."""
    for column, (sign, said) in itertools.product(NUMBERS, ((">", "above"), ("<", "below"))):
        for bound in (20, 40, 60, 80):
            yield Question(
                2,
                table,
                f"List the name of all {table} with {column} {said} {bound}.",
                f"SELECT name FROM {table} WHERE {column} {sign} {bound}",
            )


def _aggregates(table: str) -> Iterator[Question]:
    """Ask for one number about the rows with a property."""
    words = [(column, word) for column, values in WORDS.items() for word in values]
    adjectives = {"max": "highest", "min": "lowest", "sum": "total"}
    for (function, word), column, (key, value) in itertools.product(
        adjectives.items(), NUMBERS, words
    ):
        yield Question(
            3,
            table,
            f"What is the {word} {column} of the {table} with {key} {value}?",
            f"SELECT {function}({column}) FROM {table} WHERE {key} = '{value}'",
        )


def _orders(table: str) -> Iterator[Question]:
    """Ask for the first rows of an order."""
    for column, count, (order, said) in itertools.product(
        NUMBERS, (2, 3, 4), (("DESC", "highest"), ("ASC", "lowest"))
    ):
        yield Question(
            4,
            table,
            f"List the name of the {count} {table} with the {said} {column}, the {said} first.",
            f"SELECT name FROM {table} ORDER BY {column} {order} LIMIT {count}",
            True,
        )


def _groups(table: str) -> Iterator[Question]:
    """Ask for one row per group."""
    for key, (function, said), column in itertools.product(
        WORDS, (("count", "number"), ("max", "highest")), NUMBERS
    ):
        what = f"{said} of {table}" if function == "count" else f"{said} {column}"
        if function == "max" or column == NUMBERS[0]:
            inner = "*" if function == "count" else column
            yield Question(
                5,
                table,
                f"For each {key} of {table}, list the {key} and the {what}.",
                f"SELECT {key}, {function}({inner}) FROM {table} GROUP BY {key}",
            )


def _joins(table: str) -> Iterator[Question]:
    """Ask for rows with a property in another table."""
    for city, column in itertools.product(CITIES, ("name", *NUMBERS)):
        yield Question(
            6,
            table,
            f"List the {column} of all {table} whose maker is in {city}.",
            f"SELECT {table}.{column} FROM {table} JOIN makers "
            f"ON {table}.maker = makers.id WHERE makers.city = '{city}'",
        )


_LEVEL = dict(zip(LEVELS, (_columns, _comparisons, _aggregates, _orders, _groups, _joins)))


def _task(name: str, question: Question, seed: int) -> Task:
    """Make the databases of a question. Its rows in them differ, and there are some."""
    source = random.Random(f"sql/{seed}/{question.text}")
    columns = ("name", *NUMBERS, *WORDS) + (("maker",) if question.level == 6 else ())
    tables = f"{question.table}({', '.join(columns)})"
    if question.level == 6:
        tables += ", makers(id, city)"
    scripts: list[str] = []
    rows: list[Rows] = []
    while len(scripts) < 2:
        script = _script(question, columns, source)
        found = _rows(script, question.solution)
        if found and found not in rows:
            scripts.append(script)
            rows.append(found)
    payload = SqlTask(
        question.text, tables, question.solution, question.ordered, tuple(scripts), tuple(rows)
    )
    return Task(name, labels=(f"level {question.level}",), payload=payload)


def _rows(script: str, query: str) -> Rows:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(script)
        rows = database.execute(query).fetchall()
    return [] if rows == [(None,)] else rows


def _script(question: Question, columns: tuple[str, ...], source: random.Random) -> str:
    """Return the script of a database. Numbers within a column differ, so that orders are clear."""
    values: dict[str, list[object]] = {"name": source.sample(NAMES, ROWS)}
    values |= {column: source.sample(range(1, 100), ROWS) for column in NUMBERS}
    values |= {
        column: [source.choice(words) for _ in range(ROWS)] for column, words in WORDS.items()
    }
    values["maker"] = [source.randint(1, len(CITIES)) for _ in range(ROWS)]
    rows = [tuple(values[column][i] for column in columns) for i in range(ROWS)]
    script = [f"CREATE TABLE {question.table} ({', '.join(columns)});"]
    script += [f"INSERT INTO {question.table} VALUES {row};" for row in rows]
    if question.level == 6:
        cities = source.sample(CITIES, len(CITIES))
        script += ["CREATE TABLE makers (id, city);"]
        script += [f"INSERT INTO makers VALUES {(i + 1, city)};" for i, city in enumerate(cities)]
    return "\n".join(script)
