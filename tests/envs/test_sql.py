"""Check the SQL environment: tasks, the held-out split, execution match, and hostile queries."""

import os
import time
from pathlib import Path

import pytest

from jaxgrpo.envs.sql import Sql, SqlEpisode
from jaxgrpo.envs.sql_tasks import LEVELS, SqlTask, task_of
from jaxgrpo.toolkit.protocols import PROTOCOLS
from jaxgrpo.types import StopReason, Task

LAMPS = """
CREATE TABLE lamps (name, price, color);
INSERT INTO lamps VALUES ('Ada', 30, 'red');
INSERT INTO lamps VALUES ('Bo', 10, 'blue');
INSERT INTO lamps VALUES ('Cleo', 20, 'red');
"""
OTHER_LAMPS = "CREATE TABLE lamps (name, price, color); INSERT INTO lamps VALUES ('Dag', 5, 'red');"
RED = SqlTask(
    "List the name and price of all red lamps.",
    "lamps(name, price, color)",
    "SELECT name, price FROM lamps WHERE color = 'red'",
    ordered=False,
    databases=(LAMPS, OTHER_LAMPS),
    rows=([("Ada", 30), ("Cleo", 20)], [("Dag", 5)]),
)
BY_PRICE = SqlTask(
    "List the name of all lamps, the cheapest first.",
    "lamps(name, price, color)",
    "SELECT name FROM lamps ORDER BY price",
    ordered=True,
    databases=(LAMPS, OTHER_LAMPS),
    rows=([("Bo",), ("Cleo",), ("Ada",)], [("Dag",)]),
)
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "


def asked(episode: SqlEpisode, sql: str) -> tuple[str, bool]:
    call = episode.step(PROTOCOLS["native"].write_calls([("query", {"sql": sql})])).calls[0]
    return call.result, call.ok


@pytest.mark.parametrize("protocol", ["native", "tags"])
def test_the_demonstration_of_every_task_is_rewarded(protocol: str) -> None:
    suite = Sql(train_size=60, test_size=30, protocol=protocol)
    for split, size in (("train", 60), ("test", 30)):
        tasks = suite.tasks(split)
        assert len(tasks) == size
        for task in tasks:
            episode = suite.create(task)
            assert episode.score().reward == 0.0
            *before, last = [episode.step(text) for text in suite.demonstration(task)]
            assert [result.done for result in before] == [False]
            assert last.stop_reason is StopReason.FINISHED
            assert episode.score().passed, task.payload


def test_the_ground_truth_is_a_query_that_answers() -> None:
    query = Sql().ground_truth(Task("lamps", payload=RED))
    assert query == "SELECT name, price FROM lamps WHERE color = 'red'"


def test_the_levels_and_the_held_out_split() -> None:
    suite = Sql(train_size=10_000, test_size=10_000)
    train, test = suite.tasks("train"), suite.tasks("test")
    assert (len(train), len(test)) == (1328, 442)
    questions = [{task_of(task).question for task in tasks} for tasks in (train, test)]
    assert [len(q) for q in questions] == [1328, 442]
    assert not questions[0] & questions[1]
    assert {task.labels for task in train} == {(f"level {level}",) for level in LEVELS}
    for task in train:  # no constant answers a question
        one, other = task_of(task).rows
        assert one and other and one != other
    assert Sql(train_size=9).tasks("train") == Sql(train_size=9).tasks("train")
    assert Sql(seed=1).tasks("test") != Sql().tasks("test")
    assert [t.labels for t in Sql(levels=(2, 6)).tasks("train")[:3]] == [
        ("level 2",),
        ("level 6",),
        ("level 2",),
    ]


def test_what_the_policy_sees() -> None:
    opening = SqlEpisode(RED).observe()
    assert opening.messages[1].content == (
        "Tables: lamps(name, price, color)\nList the name and price of all red lamps."
    )
    assert [tool["function"]["name"] for tool in opening.tools] == ["query"]
    assert asked(SqlEpisode(RED), "SELECT max(price), count(*) FROM lamps") == ("[[30,3]]", True)


@pytest.mark.parametrize(
    ("task", "sql", "passed"),
    [
        (RED, "SELECT name, price FROM lamps WHERE color = 'red'", True),
        (RED, "SELECT name, price FROM lamps WHERE color = 'red' ORDER BY name DESC", True),
        (RED, "SELECT name, price * 1.0 FROM lamps WHERE color LIKE 'RED'", True),
        (RED, "SELECT price, name FROM lamps WHERE color = 'red'", False),
        (RED, "SELECT DISTINCT name, price FROM lamps", False),
        (
            RED,
            "SELECT name, price FROM lamps WHERE color = 'red' UNION ALL SELECT 'Ada', 30",
            False,
        ),
        (RED, "SELECT 'Ada', 30 UNION SELECT 'Cleo', 20", False),
        (RED, "SELECT name, abs(price - 1000 / (price - 5)) FROM lamps", False),
        (BY_PRICE, "SELECT name FROM lamps ORDER BY price", True),
        (BY_PRICE, "SELECT name FROM lamps ORDER BY price DESC", False),
        (BY_PRICE, "SELECT name FROM lamps", False),
    ],
)
def test_the_last_querys_rows_are_compared(task: SqlTask, sql: str, passed: bool) -> None:
    episode = SqlEpisode(task)
    assert asked(episode, "SELECT 1")[1]
    assert asked(episode, sql)[1]
    assert asked(episode, "SELECT x FROM nowhere") == ("no such table: nowhere", False)
    assert episode.score().reward == float(passed)


def test_without_a_query_nothing_is_answered() -> None:
    assert not SqlEpisode(RED).score().passed


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        (f"{ENDLESS} SELECT count(*) FROM c", "interrupted"),
        (f"{ENDLESS} SELECT x FROM c ORDER BY x DESC", "interrupted"),
        ("SELECT count(*) FROM " + ", ".join(f"lamps l{i}" for i in range(30)), "interrupted"),
        ("INSERT INTO lamps VALUES ('Eva', 1, 'red')", "not authorized"),
        ("DELETE FROM lamps", "not authorized"),
        ("DROP TABLE lamps", "not authorized"),
        ("CREATE TEMP TABLE t (a)", "not authorized"),
        ("ATTACH 'FILE' AS other", "not authorized"),
        ("VACUUM INTO 'FILE'", "authorization denied"),
        ("PRAGMA journal_mode", "not authorized"),
        ("SELECT load_extension('FILE')", "not authorized to use function: load_extension"),
        ("SELECT zeroblob(1000000000)", "not authorized to use function: zeroblob"),
        ("SELECT sum(length(replace('a', 'a', name))) FROM lamps", "not authorized"),
        ("SELECT '" + "a" * 1_500 + "' || '" + "b" * 1_500 + "'", "too big"),
        ("SELECT 1; DROP TABLE lamps", "one statement at a time"),
        ("SELECT '\x00'", "null character"),
        ("SELECT " + "(" * 5_000 + "1" + ")" * 5_000, "stack overflow"),
        ("BEGIN", "not authorized"),
    ],
)
def test_hostile_queries_are_refused_at_once(
    sql: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    episode, start = SqlEpisode(RED), time.process_time()
    text, ok = asked(episode, sql)
    assert not ok and said in text
    assert time.process_time() - start < 2
    assert asked(episode, "SELECT count(*) FROM lamps") == ("[[3]]", True)
    assert os.listdir(tmp_path) == []


def test_millions_of_rows_are_cut() -> None:
    text, ok = asked(SqlEpisode(RED), f"{ENDLESS} SELECT x FROM c")
    assert ok and text.startswith("[[1],[2],") and text.endswith(",[50]]")


def test_refusals() -> None:
    for wrong in ({"levels": ()}, {"levels": (7,)}, {"protocol": "tag"}):
        with pytest.raises(ValueError, match="must be"):
            Sql(**wrong)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        Sql().tasks("dev")
    with pytest.raises(TypeError, match="does not belong to this suite"):
        Sql().create(Task("other"))
