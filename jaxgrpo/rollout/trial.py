"""Play scripted episodes of an environment, and measure every call into it."""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.environment import (
    ClosableEnvironment,
    DemonstratingSuite,
    Observation,
    StepResult,
    TaskSuite,
)
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import (
    BlockingCalls,
    DeadlineError,
    EventLoopThread,
    gather_or_cancel,
    preserve_streams,
)
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import EpisodeKey, EpisodeRunner, Limits, SamplingParams
from jaxgrpo.rollout.openings import Opening, Places, places_of
from jaxgrpo.rollout.scripts import (
    DEMONSTRATION,
    Script,
    ScriptedSampler,
    demonstration_script,
    mistakes,
)
from jaxgrpo.rollout.user_code import (
    BrokenContractError,
    FaultyEnvironmentError,
    call_user_code,
    record_check,
)
from jaxgrpo.types import Task, Trajectory

T = TypeVar("T")

AT_ONCE = 4
"""Tasks that are tried at once. More would slow each other's calls down."""


@dataclasses.dataclass
class MadeCall:
    """A call into users' code, its seconds, its result, and whether it failed."""

    what: str
    seconds: float = 0.0
    result: object = None
    failed: bool = False

    @property
    def method(self) -> str:
        """The name of the method, e.g. "step"."""
        return method_of(self.what)


def method_of(what: str) -> str:
    """Return the method in the name of a call.

    >>> method_of("step() of task 'a'"), method_of("the rewards of task 'a'")
    ('step', 'the rewards')
    """
    return what.partition("(")[0].partition(" of ")[0]


class WatchedCalls(BlockingCalls):
    """The calls of one episode, recorded in `made`. `late`: one exceeded the deadline."""

    def __init__(self, deadline_seconds: float):
        super().__init__(1, deadline_seconds, lambda _: None)
        self.made: list[MadeCall] = []
        self.late = False

    async def run(self, function: Callable[..., T], *args: object, what: str = "") -> T:
        """Await the call, as BlockingCalls does, and record it."""
        call = MadeCall(what)
        self.made.append(call)
        began = time.perf_counter()
        try:
            result = await super().run(functools.partial(_timed, call, function, args), what=what)
        except BaseException as error:
            call.seconds = call.seconds or time.perf_counter() - began
            call.failed = True
            self.late |= isinstance(error, DeadlineError)
            raise
        call.result = result
        return result

    @property
    def failed(self) -> str:
        """The name of the call at fault, see `first_failed`."""
        return first_failed(self.made)


def first_failed(calls: Sequence[MadeCall]) -> str:
    """Return the name of the first call that failed. If none did, the result of the last one before
    close() is at fault."""
    last = [call.what for call in calls if call.method != "close"][-1]
    return next((call.what for call in calls if call.failed), last)


def _timed(call: MadeCall, function: Callable[..., T], args: tuple[object, ...]) -> T:
    """Call the function in its thread, and record the seconds without the wait for the loop."""
    began = time.perf_counter()
    try:
        return function(*args)
    finally:
        call.seconds = time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class Played:
    """One scripted episode: its trajectory, or the error if it did not open; the calls made.

    `ran_out`: the environment waited for more turns than the script has. `cut`: a turn that a stop
    string cut short, and what was lost. `ended`: the environment ended the episode, no limit did.
    `late`: a call exceeded the deadline.
    """

    task: Task
    script: Script
    calls: tuple[MadeCall, ...]
    trajectory: Trajectory | None = None
    error: str = ""
    late: bool = False
    ran_out: bool = False
    cut: tuple[str, str] | None = None

    @property
    def steps(self) -> list[StepResult]:
        return [c.result for c in self.calls if isinstance(c.result, StepResult)]

    @property
    def ended(self) -> bool:
        during = [c.result for c in self.calls if c.method == "step" and not _afterwards(c)]
        return bool(during) and isinstance(during[-1], StepResult) and during[-1].done

    @property
    def after_the_end(self) -> StepResult | None:
        """What a step after the end returned, None if it was refused or not tried."""
        results = (c.result for c in self.calls if _afterwards(c))
        return next((result for result in results if isinstance(result, StepResult)), None)

    @property
    def passed(self) -> bool:
        score = self.trajectory.score if self.trajectory else None
        return score is not None and score.passed

    @property
    def reward(self) -> float | None:
        score = self.trajectory.score if self.trajectory else None
        return None if score is None else score.reward


AFTER = "step() after the end"


def _afterwards(call: MadeCall) -> bool:
    return call.what.startswith(AFTER)


@dataclasses.dataclass(frozen=True)
class TaskTrial:
    """What was tried on a task: its opening, its scripted episodes, and `twins`, two more episodes
    with the same turns, played at the same time. `error` says why there is no demonstration.
    `late`: a call exceeded its deadline."""

    task: Task
    opening: Opening | None
    played: tuple[Played, ...]
    twins: tuple[Played, ...] = ()
    error: str = ""
    late: bool = False


class _LateTrialError(Exception):
    """A call exceeded its deadline: all others of its kind may, too."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """Tries the tasks of a suite with scripts. The first call beyond its deadline ends it."""

    suite: TaskSuite
    chat: Chat
    tokenizer: Any
    limits: Limits
    rewards: RewardSettings = RewardSettings()

    @property
    def settings(self) -> RolloutSettings:
        return self.limits.settings

    def run(self, tasks: Sequence[Task]) -> list[TaskTrial]:
        """Play all scripts on each task, some tasks at once. The result lacks the tasks that were
        not finished when a call exceeded its deadline."""
        done: dict[str, TaskTrial] = {}

        async def run_all() -> None:
            at_once = asyncio.Semaphore(min(AT_ONCE, self.settings.environment_threads))
            places = places_of(self.suite)

            async def run_one(task: Task) -> None:
                async with at_once:
                    done[task.id] = trial = await self.try_task(task, places)
                if trial.late:
                    raise _LateTrialError

            await gather_or_cancel([run_one(task) for task in tasks])

        with preserve_streams(), EventLoopThread() as loop, contextlib.suppress(_LateTrialError):
            loop.call(run_all())
        return [done[task.id] for task in tasks if task.id in done]

    async def try_task(self, task: Task, places: Places) -> TaskTrial:
        """Play the demonstration, the mistakes, and one script twice at the same time. `places`
        are those of the suite's open environments."""
        calls = WatchedCalls(self.settings.step_deadline_seconds)
        error, demonstrated = "", None
        try:
            demonstrated = await self._demonstration(task, calls)
        except FaultyEnvironmentError as faulty:
            error = faulty.recorded
            if calls.late:
                return TaskTrial(task, None, (), error=error, late=True)
        try:
            opening = await self._player(calls, None, places).open(task)
        except FaultyEnvironmentError as faulty:
            failed = Played(
                task,
                Script("opening", ()),
                tuple(calls.made),
                error=faulty.recorded,
                late=calls.late,
            )
            return TaskTrial(task, None, (failed,), error=error, late=calls.late)
        scripts = [*([demonstrated] if demonstrated else []), *mistakes(opening.observation)]
        played: list[Played] = []
        for script in scripts:
            played.append(await self.play(task, opening, script, places))
            if played[-1].late:
                return TaskTrial(task, opening, tuple(played), error=error, late=True)
        twins = await gather_or_cancel(
            [self.play(task, opening, scripts[0], places) for _ in range(2)]
        )
        late = any(one.late for one in twins)
        return TaskTrial(task, opening, tuple(played), tuple(twins), error, late)

    async def play(self, task: Task, opening: Opening, script: Script, places: Places) -> Played:
        """Play one script, and a step after the end if the environment ended the episode and cannot
        be closed."""
        calls = WatchedCalls(self.settings.step_deadline_seconds)
        sampler = ScriptedSampler(script, self.chat, self.tokenizer)
        player = self._player(calls, sampler, places)
        trajectory = await player.run(task, opening, EpisodeKey(0, "check", task.id, 0))
        played = Played(
            task,
            script,
            tuple(calls.made),
            trajectory,
            trajectory.error,
            late=calls.late,
            ran_out=sampler.ran_out,
            cut=sampler.cut,
        )
        environment: Any = next((c.result for c in calls.made if c.method == "create"), None)
        if not played.error and played.ended and not isinstance(environment, ClosableEnvironment):
            await _step_after_the_end(task, environment, calls)
            played = dataclasses.replace(played, calls=tuple(calls.made), late=calls.late)
        return played

    async def _demonstration(self, task: Task, calls: WatchedCalls) -> Script | None:
        if not isinstance(self.suite, DemonstratingSuite):
            return None
        of = f"demonstration() of task {task.id!r}"
        turns = await call_user_code(calls, of, _turns, self.suite.demonstration, task)
        return demonstration_script(turns)

    def _player(self, calls: WatchedCalls, sampler: Any, places: Places) -> EpisodeRunner:
        return EpisodeRunner(
            sampler,
            self.suite,
            self.chat,
            self.limits,
            SamplingParams(),
            calls,
            self.rewards,
            places,
        )


async def _step_after_the_end(task: Task, environment: Any, calls: WatchedCalls) -> None:
    what = f"{AFTER} of task {task.id!r}"
    with contextlib.suppress(FaultyEnvironmentError):  # refused, which is right
        await call_user_code(calls, what, record_check(StepResult), environment.step, "")


def _turns(value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(turn, str) for turn in value):
        kind = type(value).__name__
        raise BrokenContractError(f"returned {kind}, not the texts of turns, a tuple of str")
    if not value:
        raise BrokenContractError("returned no turn")
    return tuple(value)


def answers(trial: TaskTrial) -> list[Observation]:
    """Return what the environment answered to the steps of a task's episodes."""
    return [
        step.observation
        for played in trial.played
        for step in played.steps
        if step.observation is not None
    ]


def demonstrated(trial: TaskTrial) -> Played | None:
    """Return the episode of a task's demonstration, if any."""
    return next((p for p in trial.played if p.script.name == DEMONSTRATION), None)
