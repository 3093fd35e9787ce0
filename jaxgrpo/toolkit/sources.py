"""Rows of tasks from a list, a function, a JSONL file or a Hugging Face dataset.

A row is a dict with string keys. Every source refuses bad input by name, before a run starts:

    Rows([{"question": "1 + 1?", "answer": 2}])
    Generated(make_questions, {"count": 100, "seed": 0})
    JsonLines("tasks/train.jsonl")
    HuggingFace("openai/gsm8k", split="train[:1000]", name="main")
"""

import abc
import dataclasses
import difflib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgrpo import checked
from jaxgrpo.paths import absolute

MAX_ROW_CHARS = 10_000_000
"""Most characters of one line of a JSONL file."""

Row = Mapping[str, Any]


class TaskRowError(ValueError):
    """A source cannot be read, or a row is not valid. The message names the source and the row."""


class Source(abc.ABC):
    """The base class of sources. Derive a frozen dataclass from it for one of your own."""

    @abc.abstractmethod
    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield each row and its place, such as "tasks.jsonl, line 3". Raises TaskRowError."""


@dataclasses.dataclass(frozen=True)
class Rows(Source):
    """A list of dicts."""

    items: Sequence[Row]

    def rows(self) -> Iterator[tuple[str, Row]]:
        if not isinstance(self.items, list | tuple):
            given = checked.shorten_value(self.items)
            raise TaskRowError(f"the rows must be a list of dicts, got {given}")
        for i, item in enumerate(self.items):
            yield f"row {i}", _row(item, f"row {i}")


@dataclasses.dataclass(frozen=True)
class Generated(Source):
    """What a function returns or yields: `function(**arguments)`, dicts. It must give the same rows
    every time."""

    function: Callable[..., Iterable[Row]]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def rows(self) -> Iterator[tuple[str, Row]]:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        made = self.function(**self.arguments)
        if not isinstance(made, Iterable) or isinstance(made, str | Mapping):
            raise TaskRowError(
                f"{name} must give dicts, one per task, got {checked.shorten_value(made)}"
            )
        for i, item in enumerate(made):
            place = f"row {i} of {name}()"
            yield place, _row(item, place)


@dataclasses.dataclass(frozen=True)
class JsonLines(Source):
    """A file with one JSON object per line. Empty lines are skipped. A relative path starts at the
    current folder, and is made absolute, because an environment may change that."""

    path: str | Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(absolute(self.path)))

    def rows(self) -> Iterator[tuple[str, Row]]:
        try:
            with open(self.path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        place = f"{self.path}, line {number}"
                        yield place, _row(_parsed(line, place), place)
        except OSError as error:
            raise TaskRowError(f"{self.path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TaskRowError(f"{self.path} is not UTF-8: {error.reason}") from None


def _parsed(line: str, place: str) -> object:
    if len(line) > MAX_ROW_CHARS:
        raise TaskRowError(f"{place}: the line has more than {MAX_ROW_CHARS} characters")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskRowError(f"{place}: not JSON ({checked.cut(str(error), 200)})") from None


@dataclasses.dataclass(frozen=True)
class HuggingFace(Source):
    """A dataset of the Hugging Face Hub, or a folder: one that `save_to_disk` wrote, or one with
    data files. Needs `pip install 'jaxgrpo[datasets]'`.

    path       name on the Hub, or folder
    split      split in the dataset, such as "train" or "train[:90%]"
    name       configuration of the dataset, if it has several
    revision   branch, tag or commit on the Hub
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        folder = absolute(self.path)
        if os.path.isdir(folder):
            object.__setattr__(self, "path", str(folder))

    def rows(self) -> Iterator[tuple[str, Row]]:
        for i, item in enumerate(self._load()):
            place = f"{self.path}, {self.split}, row {i}"
            yield place, _row(item, place)

    def _load(self) -> Any:
        if importlib.util.find_spec("datasets") is None:
            raise TaskRowError(
                f"{self.path} needs the package datasets: pip install 'jaxgrpo[datasets]'"
            )
        import datasets  # optional, and slow to import

        folder = Path(self.path)
        try:
            if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
                return self._on_disk(datasets.load_from_disk(self.path))
            return datasets.load_dataset(
                self.path, self.name, split=self.split, revision=self.revision
            )
        except TaskRowError:
            raise
        except Exception as error:  # the edge to another library
            said = checked.cut(" ".join(str(error).split()), 300)
            raise TaskRowError(f"{self.path}: the dataset cannot be loaded: {said}") from error

    def _on_disk(self, saved: Any) -> Any:
        """Return a split of what `save_to_disk` wrote, which may be one split alone."""
        if not isinstance(saved, dict):
            return saved
        if self.split not in saved:
            raise TaskRowError(
                f"{self.path} has no split {self.split!r}; it has: {', '.join(saved)}"
            )
        return saved[self.split]


def _row(item: object, place: str) -> Row:
    if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
        raise TaskRowError(
            f"{place}: a row must be an object with names, got {checked.shorten_value(item)}"
        )
    return item


def require_keys(row: Row, wanted: Iterable[str], place: str) -> None:
    """Raise TaskRowError, which names the key and the closest one that is there, if a row lacks one
    of `wanted`."""
    for key in wanted:
        if key not in row:
            close = difflib.get_close_matches(key, row, 1)
            hint = f"; did you mean its {close[0]!r}?" if close else f"; it has: {', '.join(row)}"
            raise TaskRowError(f"{place}: the row lacks {key!r}{hint}")
