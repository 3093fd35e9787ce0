"""List the tasks of a run and open each once, before anything is loaded.

A faulty environment is found out here, within deadlines, and reported as bad input.
"""

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxgrpo import checked
from jaxgrpo.config.settings import ConfigError, RolloutSettings
from jaxgrpo.environment import KnowsGroundTruth, TaskSuite, checked_truth
from jaxgrpo.rollout.background import (
    BlockingCalls,
    EventLoopThread,
    StuckCallsError,
    gather_or_cancel,
    preserve_streams,
    print_to_stderr,
)
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.openings import Openings, describe_difference, places_of
from jaxgrpo.rollout.user_code import (
    BrokenContractError,
    FaultyEnvironmentError,
    LateError,
    async_hint,
    call_user_code,
    definition,
)
from jaxgrpo.types import GroundTruth, Task

T = TypeVar("T")

LISTING_DEADLINES = 10
"""A suite may take this many times the deadline to list its tasks, because it may fetch them."""

ENOUGH_LATE = 4
"""After this many tasks exceed the deadline while none succeeds, no further one is tried."""

SAY_EVERY_SECONDS = 5.0

Found = Mapping[str, int | FaultyEnvironmentError]
"""For each task's id, in the order of the tasks, the tokens of its prompt, or the error."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """The result for each task, and the prompt [P] of the first task that opens, if any.
    `differences` says of each task that was opened twice how its openings differ, if they do."""

    found: Found
    prompt_ids_P: np.ndarray | None
    differences: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TaskCheck:
    """Lists and opens tasks. `say` gets a line every few seconds while that takes long. Methods
    raise ConfigError, with one line, for faults that would end a run."""

    suite: TaskSuite
    settings: RolloutSettings
    say: Callable[[str], None] = print_to_stderr

    def list_tasks(self, split: str) -> list[Task]:
        """Return the suite's tasks of a split."""
        calls = BlockingCalls(
            1, LISTING_DEADLINES * self.settings.step_deadline_seconds, _in_silence
        )
        asked = call_user_code(calls, f"tasks({split!r})", _tasks, self.suite.tasks, split)
        try:
            return self._run(
                asked, calls, lambda: f"the tasks of the {split} split are being listed"
            )
        except LateError as error:
            limit = f"{LISTING_DEADLINES} x rollout.step_deadline_seconds"
            raise ConfigError(f"{error}; {limit} is the limit for listing tasks") from error
        except FaultyEnvironmentError as error:
            raise ConfigError(
                f"{error}: the environment gives no tasks of the {split} split"
            ) from error

    def open_tasks(self, chat: Chat, tasks: Sequence[Task], twice: bool = False) -> Opened:
        """Open each task once, and the first that opens twice more, because the episodes of a task
        must share their prompt. With `twice`, open every task twice instead, and report which
        openings differ."""
        calls = BlockingCalls(
            self.settings.environment_threads, self.settings.step_deadline_seconds, _in_silence
        )
        limit, places = self.settings.max_prompt_tokens, places_of(self.suite)
        openings = Openings(self.suite, chat, limit, calls, places)
        found: dict[str, int | FaultyEnvironmentError] = {}
        differences: dict[str, str] = {}
        order = {task.id: i for i, task in enumerate(tasks)}
        prompts: dict[int, np.ndarray] = {}  # that of the earliest task so far

        async def open_one(task: Task) -> None:
            try:
                opening = await openings.open(task)
                if twice:
                    async with openings.begin(task) as (made, again):
                        fault = describe_difference(task, opening.observation, again)
                    if fault:
                        place = definition(made.observe)
                        differences[task.id] = f"{fault}{f' ({place})' if place else ''}"
                prompt_ids_P = opening.prompt_ids_P
                found[task.id] = len(prompt_ids_P)
                if order[task.id] < min(prompts, default=len(tasks)):
                    prompts.clear()
                    prompts[order[task.id]] = prompt_ids_P
            except FaultyEnvironmentError as error:
                found[task.id] = error
                if _hopeless(found):
                    raise ConfigError(f"{error}; none of {len(tasks)} tasks has opened") from error

        async def open_all() -> None:
            await gather_or_cancel([open_one(task) for task in tasks])
            first = next((task for task in tasks if task.id in _that_open(found)), None)
            if first is not None and not twice:
                await _open_twice(openings, first)

        def progress() -> str:
            failed = len(found) - len(_that_open(found))
            failing = f", {failed} of them in vain" if failed else ""
            return f"{len(found)} of {len(tasks)} tasks have been opened{failing}"

        self._run(open_all(), calls, progress)
        in_order = {task.id: found[task.id] for task in tasks}
        return Opened(in_order, next(iter(prompts.values()), None), differences)

    def ground_truths(
        self, tasks: Sequence[Task]
    ) -> Mapping[str, GroundTruth | FaultyEnvironmentError]:
        """Return the ground truth of each task, or the error, by the tasks' ids. None are returned
        if the suite knows none. If calls hang, the other tasks are not asked and get an error
        too."""
        suite = self.suite
        if not isinstance(suite, KnowsGroundTruth):
            return {}
        calls = BlockingCalls(
            self.settings.environment_threads, self.settings.step_deadline_seconds, _in_silence
        )
        found: dict[str, GroundTruth | FaultyEnvironmentError] = {}

        async def ask_one(task: Task) -> None:
            what = f"ground_truth() of task {task.id!r}"
            try:
                found[task.id] = await call_user_code(calls, what, _truth, suite.ground_truth, task)
            except FaultyEnvironmentError as error:
                found[task.id] = error
                if _hopeless(found):
                    raise

        async def ask_all() -> None:
            try:
                await gather_or_cancel([ask_one(task) for task in tasks])
            except (FaultyEnvironmentError, StuckCallsError) as error:
                not_asked = FaultyEnvironmentError(str(error))
                found.update({task.id: not_asked for task in tasks if task.id not in found})

        self._run(
            ask_all(), calls, lambda: f"{len(found)} of {len(tasks)} tasks gave their ground truth"
        )
        return {task.id: found[task.id] for task in tasks}

    def _run(
        self, work: Coroutine[Any, Any, T], calls: BlockingCalls, progress: Callable[[], str]
    ) -> T:
        """Return the result of `work`, which makes `calls`; report its progress."""

        async def watched() -> T:
            task = asyncio.ensure_future(work)
            try:
                while not (await asyncio.wait([task], timeout=SAY_EVERY_SECONDS))[0]:
                    waiting = calls.oldest()
                    self.say(f"{progress()}{f'; under way: {waiting}' if waiting else ''}")
                return task.result()
            finally:
                task.cancel()

        with preserve_streams(), EventLoopThread() as loop:
            try:
                return loop.call(watched())
            except StuckCallsError as error:
                raise ConfigError(str(error)) from None


def _in_silence(line: str) -> None:
    """Print nothing: calls that hang are reported at the end."""


def _hopeless(found: Mapping[str, object]) -> bool:
    """Return whether several tasks exceeded the deadline and all others failed too."""
    late = [error for error in found.values() if isinstance(error, LateError)]
    failed = all(isinstance(one, FaultyEnvironmentError) for one in found.values())
    return len(late) >= ENOUGH_LATE and failed


def _that_open(found: Found) -> list[str]:
    return [task for task, tokens in found.items() if isinstance(tokens, int)]


async def _open_twice(openings: Openings, task: Task) -> None:
    """Raise ConfigError if the task's episodes open differently."""
    with contextlib.suppress(FaultyEnvironmentError):  # it opened before: the rollout will count it
        observations = []
        for _ in range(2):
            async with openings.begin(task) as (_, observation):
                observations.append(observation)
        fault = describe_difference(task, *observations)
        if fault:
            raise ConfigError(fault)


def _truth(value: object) -> GroundTruth:
    try:
        return checked_truth(value)
    except (TypeError, ValueError) as error:
        raise BrokenContractError(f"returned what is no ground truth: {error}") from None


def _tasks(value: object) -> list[Task]:
    """Check that a suite lists tasks with different ids."""
    tasks = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if tasks is None or not all(isinstance(task, Task) for task in tasks):
        given = checked.shorten_value(value)
        hint = async_hint(value)
        raise BrokenContractError(f"must be a list of jaxgrpo.types.Task, got {given}{hint}")
    for task in tasks:
        checked.record(task, Task, "a task")
    repeated = [name for name, times in Counter(task.id for task in tasks).items() if times > 1]
    if repeated:
        raise BrokenContractError(f"gives task {repeated[0]!r} twice: each needs an id of its own")
    return tasks
