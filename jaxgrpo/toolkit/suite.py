"""List tasks from rows, which become the arguments of an environment.

    Suite(Sums, {"train": JsonLines("train.jsonl"), "test": [{"question": "1 + 1?", "answer": 2}]})

lists a task for each row. For each episode of the task in `test`, it creates
`Sums(question="1 + 1?", answer=2)`. A row may also hold `id`, the name of its task, and `labels`,
by which an evaluation reports pass rates. Keys that the environment does not take are ignored.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgrpo import checked
from jaxgrpo.environment import Environment
from jaxgrpo.toolkit.environment import ToolEnvironment, tools_of
from jaxgrpo.toolkit.protocols import Request, protocol_of
from jaxgrpo.toolkit.sources import (
    Generated,
    JsonLines,
    Row,
    Rows,
    Source,
    TaskRowError,
    require_keys,
)
from jaxgrpo.types import ExpectedCall, Task


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of tasks: the `environment` of a config.

    environment   class, or function that returns an environment; called with a row's keys
    splits        sources by the name of their split, any names; training uses "train". A list of
                  dicts, a function that yields dicts and the path of a JSONL file are sources too
    options       arguments of the environment that are the same for all tasks
    protocol      "native" or "tags", in place of a ToolEnvironment's own; "" keeps that
    id_key        key of a row that names its task; without it, the split and a number do
    labels_key    key of a row that holds a label, or a list of them

    Raises TypeError or ValueError if one of them is not valid. `tasks` raises TaskRowError.
    """

    environment: Callable[..., Environment]
    splits: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    protocol: str = ""
    id_key: str = "id"
    labels_key: str = "labels"

    def __post_init__(self) -> None:
        if not callable(self.environment):
            given = checked.shorten_value(self.environment)
            raise TypeError(f"environment must be a class or a function, got {given}")
        if not isinstance(self.splits, Mapping) or not self.splits:
            given = checked.shorten_value(self.splits)
            raise TypeError(f'splits must be a dict such as {{"train": [...]}}, got {given}')
        sources = {
            checked.name(split, "the name of a split"): _source(given, split)
            for split, given in self.splits.items()
        }
        object.__setattr__(self, "splits", sources)
        if self._has_tools:
            tools_of(self.environment)
        if self.protocol:
            protocol_of(self.protocol)
            if not self._has_tools:
                raise ValueError("protocol is for environments that derive from ToolEnvironment")
        unknown = [name for name in self.options if not self._takes(name)]
        if unknown:
            takes = ", ".join(self._parameters)
            raise ValueError(f"the environment takes no option {unknown[0]!r}; it takes: {takes}")

    def tasks(self, split: str) -> list[Task]:
        """Return the tasks of a split. Raises TaskRowError, which names the row, if one is not
        valid."""
        if split not in self.splits:
            raise TaskRowError(f"there is no split {split!r}; there are: {', '.join(self.splits)}")
        places: dict[str, str] = {}
        tasks: list[Task] = []
        for place, row in self.splits[split].rows():
            task = self._task(row, place, f"{split}_{len(tasks)}")
            if task.id in places:
                raise TaskRowError(f"{place}: the id {task.id!r} is that of {places[task.id]} too")
            places[task.id] = place
            tasks.append(task)
        return tasks

    def create(self, task: Task) -> Environment:
        """Create the environment of one episode, with copies of the row's values."""
        made = self.environment(**{**self._row(task), **copy.deepcopy(dict(self.options))})
        if self.protocol:
            object.__setattr__(made, "protocol", self.protocol)  # it may be a frozen dataclass
        return made

    def _task(self, row: Row, place: str, name: str) -> Task:
        require_keys(row, self._required, place)
        labels = row.get(self.labels_key, ())
        given = row.get(self.id_key, name)
        try:
            return Task(
                str(given) if type(given) is int else given,
                (labels,) if isinstance(labels, str) else labels,
                {key: value for key, value in row.items() if self._takes(key)},
            )
        except (TypeError, ValueError) as error:
            keys = f"id_key is {self.id_key!r}, labels_key is {self.labels_key!r}"
            raise TaskRowError(f"{place}: {error} ({keys})") from None

    def _row(self, task: Task) -> dict[str, Any]:
        """Return a copy of a task's row."""
        if not isinstance(task.payload, Mapping):
            raise TypeError(f"task {task.id!r} does not belong to this suite")
        return copy.deepcopy(dict(task.payload))

    @property
    def _has_tools(self) -> bool:
        return isinstance(self.environment, type) and issubclass(self.environment, ToolEnvironment)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.environment).parameters

    @property
    def _required(self) -> list[str]:
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and name not in self.options
        ]

    def _takes(self, key: str) -> bool:
        parameters = self._parameters
        return key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@dataclasses.dataclass(frozen=True)
class DemonstratedSuite(Suite):
    """A suite of a ToolEnvironment whose tasks have a known solution. It is demonstrated (see
    `jaxgrpo.tools.warm_start`), and recorded as the ground truth, which the viewer shows.

    solution   function that returns the calls that solve a task, as [("add", {"a": 1, "b": 2})];
               called with those of the row's keys that it takes
    """

    solution: Callable[..., Sequence[Request]] = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._has_tools or not callable(self.solution):
            raise TypeError("solution must be a function, for a class derived from ToolEnvironment")

    def demonstration(self, task: Task) -> tuple[str, ...]:
        """Return policy turns that solve a task, one call each."""
        made = self.create(task)
        assert isinstance(made, ToolEnvironment)
        protocol = protocol_of(made.protocol)
        turns = [protocol.write_calls([call], f"I call {call[0]}.") for call in self._calls(task)]
        return (*turns, protocol.write_end())

    def ground_truth(self, task: Task) -> tuple[ExpectedCall, ...]:
        """Return the calls that solve a task."""
        return tuple(ExpectedCall(name, arguments) for name, arguments in self._calls(task))

    def _calls(self, task: Task) -> Sequence[Request]:
        row, takes = self._row(task), inspect.signature(self.solution).parameters
        return self.solution(**{key: value for key, value in row.items() if key in takes})


def _source(given: Any, split: str) -> Source:
    """Return a source as it is; make one of a list, a function or the path of a JSONL file."""
    if isinstance(given, Source):
        return given
    if isinstance(given, list | tuple):
        return Rows(given)
    if isinstance(given, str | Path):
        return JsonLines(given)
    if callable(given):
        return Generated(given)
    raise TypeError(
        f"the source of split {split!r} must be a list of dicts, a function, the path of a JSONL "
        f"file, or one of jaxgrpo.toolkit.sources, got {checked.shorten_value(given)}"
    )
