"""Read BFCL's multi-turn tasks. Split them, and order a curriculum, as the article does.

The package holds JSON lines in `data/BFCL_<release>_multi_turn_<category>.json`, and the ground
truth in files of the same names under `data/possible_answer/`.
"""

import dataclasses
import functools
import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.envs.bfcl import simulators
from jaxgrpo.envs.bfcl.docs import Document
from jaxgrpo.envs.bfcl.execution import Call, Session, parse_call
from jaxgrpo.envs.bfcl.source import RELEASES, Package, SourceError
from jaxgrpo.types import Task

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
SPLIT_SEED = 42
SPLIT_SIZE = 100
CATEGORY_SIZE = 200
CURRICULUM_SEED = 42

_LOADING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class BfclTurn:
    """One user turn: the user's message, the ground truth, and tools offered from here on.

    The message is "" if the turn only announces new tools.
    """

    query: str
    truth: tuple[Call, ...]
    new_tools: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class BfclTask:
    """The payload of a Task. `tools` are the names offered from the start.

    `initial_config` is JSON text, so that no simulator can mutate it.
    """

    id: str
    category: str
    involved: tuple[str, ...]
    initial_config: str
    turns: tuple[BfclTurn, ...]
    tools: tuple[str, ...]

    @property
    def long_context(self) -> bool:
        return self.category == "long_context"


@dataclasses.dataclass(frozen=True)
class Library:
    """The contents of the package: simulator classes, documents by class, tasks by category."""

    classes: Mapping[str, type]
    documents: Mapping[str, Mapping[str, Document]]
    tasks: Mapping[str, Mapping[str, BfclTask]]

    def document(self, task: BfclTask, name: str) -> Document:
        """Return the document of one tool of the task's classes."""
        return next(
            self.documents[owner][name] for owner in task.involved if name in self.documents[owner]
        )

    def session(self, task: BfclTask) -> Session:
        """Start a session on the task's initial state, with all documented methods callable."""
        instances = simulators.create_instances(
            self.classes, task.involved, task.initial_config, task.long_context
        )
        return Session(
            instances, [name for owner in task.involved for name in self.documents[owner]]
        )


def load_library(package: Package) -> Library:
    """Read the data, once per package. Raises SourceError if they are not as expected."""
    with _LOADING:
        return _load_library(package)


@functools.cache
def _load_library(package: Package) -> Library:
    classes = simulators.load_classes(package)
    try:
        documents = {
            owner: {
                doc["name"]: doc
                for doc in _read_lines(package.folder / "data" / "multi_turn_func_doc" / file)
            }
            for owner, file in simulators.DOCS.items()
        }
        signatures = {
            name: inspect.signature(getattr(classes[owner], name))
            for owner, docs in documents.items()
            for name in docs
        }
        tasks = {
            category: _read_category(package, category, documents, signatures)
            for category in CATEGORIES
        }
    except (OSError, LookupError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise SourceError(
            f"the data in {package.folder} are not those of BFCL {package.release.name} "
            f"({type(error).__name__}: {error}); "
            f"known releases: {', '.join(r.version for r in RELEASES.values())}"
        ) from error
    return Library(classes, documents, tasks)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _read_category(
    package: Package,
    category: str,
    documents: Mapping[str, Mapping[str, Document]],
    signatures: Mapping[str, inspect.Signature],
) -> dict[str, BfclTask]:
    name = package.release.data_file(category)
    truths = {
        row["id"]: row["ground_truth"]
        for row in _read_lines(package.folder / "data" / "possible_answer" / name)
    }
    tasks = {}
    for row in _read_lines(package.folder / "data" / name):
        truth = [tuple(parse_call(text, signatures) for text in turn) for turn in truths[row["id"]]]
        tasks[row["id"]] = _task(row, category, truth, documents)
    if len(tasks) != CATEGORY_SIZE:
        raise ValueError(f"{name} holds {len(tasks)} tasks, not {CATEGORY_SIZE}")
    return tasks


def _task(
    row: dict[str, Any],
    category: str,
    truth: Sequence[tuple[Call, ...]],
    documents: Mapping[str, Mapping[str, Document]],
) -> BfclTask:
    """Build one task from its row.

    Excluded tools are never offered. Withheld tools (`missed_function`) are offered from the turn
    that the data names. A tool that the ground truth needs earlier is not withheld, because the
    task could not be solved otherwise (`tail` in miss_func_49).
    """
    excluded = set(row.get("excluded_function", ()))
    withheld = {
        turn: tuple(
            name
            for name in names
            if not any(call.name == name for calls in truth[:turn] for call in calls)
        )
        for turn, names in (
            (int(turn), names) for turn, names in row.get("missed_function", {}).items()
        )
    }
    hidden = excluded.union(*withheld.values())
    turns = tuple(
        BfclTurn(
            query="\n\n".join(message["content"] for message in messages),
            truth=calls,
            new_tools=tuple(name for name in withheld.get(index, ()) if name not in excluded),
        )
        for index, (messages, calls) in enumerate(zip(row["question"], truth, strict=True))
    )
    return BfclTask(
        id=row["id"],
        category=category,
        involved=tuple(row["involved_classes"]),
        initial_config=json.dumps(row["initial_config"]),
        turns=turns,
        tools=tuple(
            name
            for owner in row["involved_classes"]
            for name in documents[owner]
            if name not in hidden
        ),
    )


def split_ids(ids: Sequence[str], split: str) -> list[str]:
    """Split as the article does: sorted ids, permuted with seed 42.

    The first 100 are "test", the last 100 "train", both in permuted order.
    """
    ordered = sorted(ids)
    permuted = [
        ordered[index] for index in np.random.RandomState(SPLIT_SEED).permutation(len(ordered))
    ]
    if split == "test":
        return permuted[:SPLIT_SIZE]
    if split == "train":
        return permuted[-SPLIT_SIZE:]
    raise ValueError(f"no split {split!r}: a split is 'train' or 'test'")


def curriculum(tasks: Sequence[BfclTask], max_turns: int) -> list[BfclTask]:
    """Copy each task for every number of user turns up to its own, at most `max_turns`.

    Copies of few turns come first. Copies with the same number of turns are shuffled, in the order
    of the article's code: it sorts by turns + u, with u uniform in [0, 0.1) from RandomState(42),
    before it removes the longer ones. `tasks` are one split's, in the order of the data file.
    """
    copies = [
        dataclasses.replace(task, turns=task.turns[:count])
        for task in tasks
        for count in range(1, len(task.turns) + 1)
    ]
    noise = np.random.RandomState(CURRICULUM_SEED).random_sample(len(copies)) * 0.1
    keys = [len(copy.turns) + shift for copy, shift in zip(copies, noise, strict=True)]
    ordered = [copies[index] for index in np.argsort(keys, kind="stable")]
    return [copy for copy in ordered if len(copy.turns) <= max_turns]


def as_task(task: BfclTask, name: str | None = None) -> Task:
    """Wrap a BfclTask as a Task, under its own id or `name`. Labels are its API classes."""
    return Task(name or task.id, labels=task.involved, payload=task)
