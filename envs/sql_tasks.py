"""Generate questions over small SQLite databases, in six levels of growing difficulty.

| level | asks for | answered by, for example |
|---|---|---|
| 1 | one column | `SELECT name FROM lamps` |
| 2 | rows with a property | `SELECT name FROM lamps WHERE price > 30` |
| 3 | one number about them | `SELECT max(price) FROM lamps WHERE color = 'red'` |
| 4 | the first rows of an order | `SELECT name FROM lamps ORDER BY price DESC LIMIT 3` |
| 5 | one row per group | `SELECT color, count(*) FROM lamps GROUP BY color` |
| 6 | a property in another table | `SELECT lamps.name FROM lamps JOIN makers ON ... WHERE ...` |

The splits have no question in common. Each task has two databases with the same tables and other
rows: the policy sees the first, and an answer must be right in both, so that a constant is not one.
"""

import contextlib
import dataclasses
import itertools
import random
import sqlite3
from collections.abc import Iterator

from jaxgrpo.types import Task

LEVELS = (1, 2, 3, 4, 5, 6)
TABLES = ("lamps", "chairs", "ropes", "vases", "drums", "kites", "bells", "sleds", "tents", "masks")
NUMBERS = ("price", "weight", "year", "stock")
WORDS = {"color": ("red", "blue", "green", "white"), "size": ("small", "medium", "large")}
CITIES = ("Oslo", "Lima", "Cairo", "Quito")
NAMES = ("Ada", "Bo", "Cleo", "Dag", "Eva", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Lee")
ROWS = 8


@dataclasses.dataclass(frozen=True)
class Question:
    """One question, the query that answers it, and whether the order of its rows matters."""

    level: int
    table: str
    text: str
    solution: str
    ordered: bool = False


@dataclasses.dataclass(frozen=True)
class SqlTask:
    """The payload of a task: the question, and the scripts that make its two databases."""

    question: Question
    tables: str
    scripts: tuple[str, str]


def sql_tasks(split: str, levels: tuple[int, ...], size: int, seed: int = 0) -> list[Task]:
    """Return at most `size` tasks of a split, the same number of each level. A quarter of all
    questions is held out as `test`. Raises ValueError for another split or level."""
    if split not in ("train", "test"):
        raise ValueError(f"no split {split!r}: a split is 'train' or 'test'")
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        raise ValueError(f"levels must be any of {LEVELS}, got {levels}")
    of_level = [_questions(level, split, seed) for level in levels]
    chosen = [q for together in itertools.zip_longest(*of_level) for q in together if q is not None]
    return [_task(question, i, split, seed) for i, question in enumerate(chosen[:size])]


def _questions(level: int, split: str, seed: int) -> list[Question]:
    every = [question for table in TABLES for question in _about(level, table)]
    random.Random(f"sql/{seed}/{level}").shuffle(every)
    held_out = len(every) // 4
    return every[:held_out] if split == "test" else every[held_out:]


def _about(level: int, table: str) -> Iterator[Question]:
    """Yield all questions of a level about a table."""
    words = [(column, word) for column, values in WORDS.items() for word in values]
    if level == 1:
        for column in ("name", *NUMBERS, *WORDS):
            yield Question(
                1, table, f"List the {column} of all {table}.", f"SELECT {column} FROM {table}"
            )
    elif level == 2:
        for column, (sign, said) in itertools.product(NUMBERS, ((">", "above"), ("<", "below"))):
            for bound in (20, 40, 60, 80):
                yield Question(
                    2,
                    table,
                    f"List the name of all {table} with {column} {said} {bound}.",
                    f"SELECT name FROM {table} WHERE {column} {sign} {bound}",
                )
    elif level == 3:
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
    elif level == 4:
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
    elif level == 5:
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
    else:
        for city, column in itertools.product(CITIES, ("name", *NUMBERS)):
            yield Question(
                6,
                table,
                f"List the {column} of all {table} whose maker is in {city}.",
                f"SELECT {table}.{column} FROM {table} JOIN makers "
                f"ON {table}.maker = makers.id WHERE makers.city = '{city}'",
            )


def _task(question: Question, index: int, split: str, seed: int) -> Task:
    source = random.Random(f"sql/{seed}/{split}/{question.text}")
    columns = ("name", *NUMBERS, *WORDS) + (("maker",) if question.level == 6 else ())
    tables = f"{question.table}({', '.join(columns)})"
    if question.level == 6:
        tables += ", makers(id, city)"
    first, second = _script(question, columns, source), _script(question, columns, source)
    while not (_rows(first, question) and _rows(second, question)) or _rows(
        first, question
    ) == _rows(second, question):
        first, second = _script(question, columns, source), _script(question, columns, source)
    name = f"sql_{split}_{index}"
    return Task(
        name,
        labels=(f"level {question.level}",),
        payload=SqlTask(question, tables, (first, second)),
    )


def _rows(script: str, question: Question) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(script)
        rows = database.execute(question.solution).fetchall()
    return [row for row in rows if row != (None,)]


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
