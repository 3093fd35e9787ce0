"""The suite of BFCL's multi-turn tasks, for the `environment` of a config."""

import dataclasses
import difflib
from collections.abc import Collection, Sequence

from jaxgrpo.environment import Environment
from jaxgrpo.envs.bfcl.docs import DETAILS
from jaxgrpo.envs.bfcl.env import BfclEnvironment, EpisodeOptions
from jaxgrpo.envs.bfcl.protocols import EXAMPLES, PROTOCOLS
from jaxgrpo.envs.bfcl.simulators import MODULES
from jaxgrpo.envs.bfcl.source import RELEASES, open_package
from jaxgrpo.envs.bfcl.tasks import (
    CATEGORIES,
    BfclTask,
    Library,
    as_task,
    curriculum,
    load_library,
    split_ids,
)
from jaxgrpo.types import ExpectedCall, Task

REWARDS = ("official", "call_match")


@dataclasses.dataclass(frozen=True)
class Bfcl:
    """BFCL's multi-turn tasks, split as in the article: per category, 100 to train and 100 to test.

    release              "v3" (used by the article) or "v4" (used by the current leaderboard)
    categories           any of base, miss_func, miss_param, long_context
    protocol             "tags" (plain text) or "native" (the chat template's tool calls)
    docs                 "full", "article" (full, as the article's code words it),
                         "without_response", or "signatures" (one short line per tool)
    examples             worked protocol examples with made-up tools before the task, 0 to 3
    max_turns            maximum number of user turns per task; 1 is the first query only
    curriculum           train on a copy of each task for every number of user turns up to
                         max_turns, few turns first, in the order of the article's code
    max_steps_per_turn   policy turns per user turn; then the episode ends with STEP_LIMIT
    run_last_step        whether the calls of the last policy turn before that limit run; in the
                         article's code they do not
    reward               "official" (state and response of each turn) or "call_match" (the
                         article's rubric)
    stop_at_lost_turn    whether the first turn that fails the official check ends the episode;
                         in the article's code it does not
    result_limit         characters of each tool result that the policy sees, 0 for all; the check
                         always sees the whole result
    task_ids             train only on these tasks of the train split, in the split's order
    classes              train only on tasks that involve no other API classes, () for any
    max_calls            train only on tasks with at most this many calls in the user turns that
                         are used, 0 for any
    train_limit          train on the first of the remaining tasks only, up to this number, 0 for
                         all
    folder               an unpacked bfcl_eval to use instead of the downloaded one
    """

    release: str = "v3"
    categories: tuple[str, ...] = ("base",)
    protocol: str = "tags"
    docs: str = "full"
    examples: int = 0
    max_turns: int = 1
    curriculum: bool = False
    max_steps_per_turn: int = 10
    run_last_step: bool = True
    reward: str = "official"
    stop_at_lost_turn: bool = True
    result_limit: int = 0
    task_ids: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    max_calls: int = 0
    train_limit: int = 0
    folder: str | None = None

    def __post_init__(self) -> None:
        _require("release", self.release, RELEASES)
        if isinstance(self.categories, str) or not self.categories:
            raise ValueError(
                f'categories must be a tuple such as ("base",), got {self.categories!r}'
            )
        for category in self.categories:
            _require("category", category, CATEGORIES)
        if len(set(self.categories)) != len(self.categories):
            raise ValueError(f"categories names one twice: {self.categories}")
        for name in ("task_ids", "classes"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of names, got {getattr(self, name)!r}")
        for name in self.classes:
            _require("API class", name, list(MODULES))
        _require("protocol", self.protocol, PROTOCOLS)
        _require("docs", self.docs, DETAILS)
        _require("reward", self.reward, REWARDS)
        for name, low, high in (
            ("examples", 0, len(EXAMPLES)),
            ("max_turns", 1, None),
            ("max_steps_per_turn", 1, None),
            ("result_limit", 0, None),
            ("max_calls", 0, None),
            ("train_limit", 0, None),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < low or (high is not None and value > high):
                bounds = f"from {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} must be a whole number {bounds}, got {value!r}")

    def tasks(self, split: str) -> Sequence[Task]:
        """List the split's tasks by category, each in the article's order."""
        tasks = [
            task for category in self.categories for task in self._category_split(category, split)
        ]
        if split != "train":
            return tasks
        if self.task_ids:
            ids = {_payload(task).id for task in tasks}
            for wanted in self.task_ids:
                _require("task id of the train split", wanted, ids)
            tasks = [task for task in tasks if _payload(task).id in self.task_ids]
        if self.classes:
            tasks = [task for task in tasks if set(task.labels) <= set(self.classes)]
        if self.max_calls:
            tasks = [
                task
                for task in tasks
                if sum(len(turn.truth) for turn in _payload(task).turns[: self.max_turns])
                <= self.max_calls
            ]
        return tasks[: self.train_limit] if self.train_limit else tasks

    def create(self, task: Task) -> Environment:
        return BfclEnvironment(self._library(), _payload(task), self._options())

    def demonstration(self, task: Task) -> tuple[str, ...]:
        """Return policy turns that solve the task.

        For each user turn they are the ground truth as one list of calls, and the end of the turn.
        If nothing can be done, in the categories that withhold something, the policy gives up.
        """
        payload, protocol = _payload(task), PROTOCOLS[self.protocol]
        texts = []
        for turn in payload.turns[: self.max_turns]:
            if turn.truth:
                names = ", ".join(dict.fromkeys(call.name for call in turn.truth))
                calls = [(call.name, call.arguments) for call in turn.truth]
                texts.append(protocol.write_calls(calls, f"I call {names}."))
            impossible = not turn.truth and payload.category in ("miss_func", "miss_param")
            texts.append(protocol.write_end(impossible))
        return tuple(texts)

    def ground_truth(self, task: Task) -> tuple[ExpectedCall, ...]:
        """Return the ground truth's calls of the user turns that are used."""
        turns = _payload(task).turns[: self.max_turns]
        return tuple(
            ExpectedCall(call.name, call.arguments) for turn in turns for call in turn.truth
        )

    def _category_split(self, category: str, split: str) -> list[Task]:
        tasks = self._library().tasks[category]
        ids = split_ids(list(tasks), split)
        if not self.curriculum or split != "train":
            return [as_task(tasks[task_id]) for task_id in ids]
        copies = curriculum([task for task in tasks.values() if task.id in ids], self.max_turns)
        return [as_task(copy, f"{copy.id}:{len(copy.turns)}") for copy in copies]

    def _library(self) -> Library:
        return load_library(open_package(self.release, self.folder))

    def _options(self) -> EpisodeOptions:
        return EpisodeOptions(
            protocol=PROTOCOLS[self.protocol],
            docs=self.docs,
            examples=self.examples,
            max_turns=self.max_turns,
            max_steps_per_turn=self.max_steps_per_turn,
            run_last_step=self.run_last_step,
            reward=self.reward,
            stop_at_lost_turn=self.stop_at_lost_turn,
            result_limit=self.result_limit,
        )


def _payload(task: Task) -> BfclTask:
    if not isinstance(task.payload, BfclTask):
        raise TypeError(
            f"task {task.id!r} does not belong to this suite: "
            f"its payload is a {type(task.payload).__name__}"
        )
    return task.payload


def _require(what: str, given: str, allowed: Collection[str]) -> None:
    """Refuse an unknown name, and suggest the closest allowed one."""
    if given in allowed:
        return
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    names = ", ".join(list(allowed)[:12]) + (" ..." if len(allowed) > 12 else "")
    raise ValueError(f"unknown {what} {given!r}: {hint}allowed: {names}")
