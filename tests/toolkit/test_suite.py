"""Check tasks from lists, functions, files and datasets, and that bad rows are refused by name."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.encoding import decode, encode
from jaxgrpo.environment import KnowsGroundTruth
from jaxgrpo.toolkit.environment import ToolEnvironment
from jaxgrpo.toolkit.sources import Generated, HuggingFace, JsonLines, Rows, TaskRowError
from jaxgrpo.toolkit.suite import DemonstratedSuite, Suite
from jaxgrpo.types import ExpectedCall, Score, Task


@dataclasses.dataclass
class Sums(ToolEnvironment):
    question: str
    answer: list[int]
    bonus: float = 0.0

    def first_message(self) -> str:
        return self.question

    def add(self, number: int) -> int:
        """Add a number to the answer."""
        self.answer.append(number)
        return sum(self.answer)

    def score(self) -> Score:
        return Score(len(self.answer) + self.bonus, passed=True)


ROWS = [
    {"id": "a", "question": "1?", "answer": [1], "labels": ["easy", "sum"]},
    {"question": "2?", "answer": [2], "labels": "hard", "unused": 7},
]


def sums(count: int = 2) -> Iterator[dict[str, Any]]:
    for i in range(count):
        yield {"question": f"{i}?", "answer": [i]}


def test_rows_become_tasks_and_arguments() -> None:
    suite = Suite(Sums, {"train": ROWS, "hard": Rows(ROWS[1:])}, {"bonus": 0.5}, protocol="tags")
    assert suite.tasks("train") == [
        Task("a", ("easy", "sum"), {"question": "1?", "answer": [1]}),
        Task("train_1", ("hard",), {"question": "2?", "answer": [2]}),
    ]
    made = suite.create(suite.tasks("hard")[0])
    assert isinstance(made, Sums)
    assert (made.question, made.answer, made.bonus) == ("2?", [2], 0.5)
    assert made.observe().stop_strings  # those of tags


def test_episodes_do_not_share_a_rows_values() -> None:
    suite = Suite(Sums, {"train": ROWS})
    task = suite.tasks("train")[0]
    made: Any = suite.create(task)
    made.add(5)
    assert suite.create(task).score().reward == 1.0


def test_a_function_and_a_file_are_sources_too(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    suite = Suite(
        Sums,
        {
            "short": file,
            "long": JsonLines(str(file)),
            "made": sums,
            "many": Generated(sums, {"count": 5}),
        },
    )
    assert [task.id for task in suite.tasks("short")] == ["a", "short_1"]
    assert suite.tasks("long")[1].payload == {"question": "2?", "answer": [2]}
    assert [len(suite.tasks(split)) for split in ("made", "many")] == [2, 5]
    assert suite.tasks("many") == suite.tasks("many")


def test_a_relative_path_holds_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks.jsonl").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    suite = Suite(Sums, {"train": "tasks.jsonl", "dev": JsonLines("tasks.jsonl")})
    monkeypatch.chdir("/")
    assert [len(suite.tasks(split)) for split in ("train", "dev")] == [1, 1]
    assert decode(encode(suite)).tasks("train") == suite.tasks("train")


def test_a_plain_class_may_take_any_key() -> None:
    class Plain:
        def __init__(self, **row: object):
            self.row = row

    made: Any = Suite(Plain, {"x": [{"a": 1, "id": "b"}]})  # type: ignore[arg-type]
    assert made.create(made.tasks("x")[0]).row == {"a": 1, "id": "b"}


def bad(text: str, tmp_path: Path) -> Suite:
    (tmp_path / "bad.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    return Suite(Sums, {"train": tmp_path / "bad.jsonl"})


GOOD = '{"id": "a", "question": "1?", "answer": [1]}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{GOOD}\n{{", "bad.jsonl, line 2: not JSON"),
        (f"{GOOD}\n\n[1]", "bad.jsonl, line 3: a row must be an object with names, got \\[1\\]"),
        (f"{GOOD}\n{GOOD}", "line 2: the id 'a' is that of .*bad.jsonl, line 1 too"),
        ('{"question": "1?", "anser": [1]}', "line 1: the row lacks 'answer'; did you mean its"),
        ('{"text": "1?"}', "line 1: the row lacks 'question'; it has: text"),
        ('{"question": "", "answer": [], "id": ["x"]}', "line 1: a task's id must be a str, got"),
        ('{"question": "", "answer": [], "id": ""}', "line 1: a task's id must be 1 to 500"),
        ('{"question": "", "answer": [], "labels": 3}', "labels_key is 'labels'"),
        ("[" * 100_000, "line 1: not JSON"),
        ("\udcff", "bad.jsonl is not UTF-8"),
    ],
)
def test_bad_rows_are_refused_by_file_and_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TaskRowError, match=said):
        bad(text, tmp_path).tasks("train")


def test_other_sources_that_give_no_rows() -> None:
    for source, said in (
        (Rows([3]), "row 0: a row must be an object with names, got 3"),  # type: ignore[list-item]
        (Rows("ab"), "the rows must be a list of dicts, got 'ab'"),  # type: ignore[arg-type]
        (Generated(str), "str must give dicts, one per task, got ''"),
        (Generated(lambda: [{1: 2}]), "row 0 of <lambda>\\(\\): a row must be an object"),
        (JsonLines("/nowhere/x.jsonl"), "/nowhere/x.jsonl cannot be read: No such file"),
    ):
        with pytest.raises(TaskRowError, match=said):
            list(source.rows())
    with pytest.raises(TaskRowError, match="no split 'test'; there are: train"):
        Suite(Sums, {"train": ROWS}).tasks("test")


def test_a_suite_refuses_what_it_cannot_use() -> None:
    arguments: Any
    for arguments, said in (
        ((3, {"train": ROWS}), "environment must be a class or a function, got 3"),
        ((Sums, {}), "splits must be a dict"),
        ((Sums, ROWS), "splits must be a dict"),
        ((Sums, {"train": 3}), "the source of split 'train' must be"),
        ((Sums, {"train": ROWS}, {"bonsu": 1}), "takes no option 'bonsu'; it takes: question"),
        ((Sums, {"train": ROWS}, {}, "tag"), "protocol must be one of native, tags"),
        (
            (dict, {"train": ROWS}, {}, "tags"),
            "protocol is for environments that derive from",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            Suite(*arguments)
    with pytest.raises(TypeError, match="does not belong to this suite"):
        Suite(Sums, {"train": ROWS}).create(Task("x", payload=3))


def add_answer(answer: list[int]) -> list[tuple[str, dict[str, Any]]]:
    return [("add", {"number": number}) for number in answer]


def test_a_solution_is_demonstrated_in_the_suites_protocol() -> None:
    suite = DemonstratedSuite(Sums, {"train": ROWS}, protocol="tags", solution=add_answer)
    task = suite.tasks("train")[1]
    assert suite.demonstration(task) == (
        '<reasoning>I call add.</reasoning>\n<tool>[{"name": "add", "args": {"number": 2}}]</tool>',
        "<TASK_FINISHED>",
    )
    native = DemonstratedSuite(Sums, {"train": ROWS}, solution=add_answer).demonstration(task)
    assert native[0].startswith("I call add.\n<tool_call>")
    made = suite.create(task)
    assert [made.step(text).done for text in suite.demonstration(task)] == [False, True]
    assert made.score().reward == 2.0
    assert decode(encode(suite)).demonstration(task) == suite.demonstration(task)
    with pytest.raises(TypeError, match="solution must be a function, for a class derived from"):
        DemonstratedSuite(dict, {"train": ROWS}, solution=add_answer)  # type: ignore[arg-type]


def test_a_solution_is_the_ground_truth() -> None:
    def solution(question: str, answer: list[int]) -> list[tuple[str, dict[str, Any]]]:
        return [("add", {"number": answer.pop()}), ("add", {"number": len(question)})]

    suite = DemonstratedSuite(Sums, {"train": ROWS}, solution=solution)
    task = suite.tasks("train")[1]
    assert isinstance(suite, KnowsGroundTruth)
    for _ in range(2):  # what the function does to a row is not seen by the next call
        assert suite.ground_truth(task) == (
            ExpectedCall("add", {"number": 2}),
            ExpectedCall("add", {"number": 2}),
        )
    with pytest.raises(TypeError, match="task 'x' does not belong to this suite"):
        suite.ground_truth(Task("x", payload=3))


def test_a_config_records_a_suite_and_reads_it_back() -> None:
    suite = Suite(Sums, {"train": ROWS, "test": Generated(sums, {"count": 3})}, {"bonus": 0.5})
    again = decode(encode(suite, places=True))
    assert again.tasks("train") == suite.tasks("train")
    assert again.tasks("test") == suite.tasks("test")
    assert again.options == {"bonus": 0.5}


def test_a_dataset_without_the_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaskRowError, match="pip install 'jaxgrpo\\[datasets\\]'"):
        list(HuggingFace("somewhere").rows())


@pytest.mark.slow  # where .ci/run installs the package
def test_datasets_are_read_offline_from_a_folder(tmp_path: Path) -> None:
    """A split alone, a dict of splits, and data files."""
    datasets = pytest.importorskip("datasets")
    rows = [{"question": "1?", "answer": [1]}, {"question": "2?", "answer": [2]}]
    alone = datasets.Dataset.from_list(rows)
    alone.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": alone, "dev": alone.select([1])}).save_to_disk(tmp_path / "both")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = Suite(
        Sums,
        {
            "train": HuggingFace(str(tmp_path / "alone")),
            "dev": HuggingFace(str(tmp_path / "both"), split="dev"),
            "files": HuggingFace(str(tmp_path / "files"), split="train[:1]"),
            "none": HuggingFace(str(tmp_path / "both"), split="test"),
            "nowhere": HuggingFace(str(tmp_path / "nowhere")),
        },
    )
    assert [task.payload for task in suite.tasks("train")] == rows
    assert [task.payload for task in suite.tasks("dev")] == rows[1:]
    assert [task.payload for task in suite.tasks("files")] == rows[:1]
    with pytest.raises(TaskRowError, match="both has no split 'test'; it has: train, dev"):
        suite.tasks("none")
    with pytest.raises(TaskRowError, match="nowhere: the dataset cannot be loaded"):
        suite.tasks("nowhere")
