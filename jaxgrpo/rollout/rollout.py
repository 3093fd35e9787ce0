"""Plays the episodes of many groups at once: a batch of tasks in, scored groups out.

Faults: an episode that its environment ended with an error is tried again in a fresh environment with fresh seeds; when its tries are spent
the whole group is dropped and counted. A fault never becomes a reward. A sampler that raises ends the rollout: its exception reaches the
caller after all other episodes are cancelled and released.
"""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxgrpo.environment import TaskSuite
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import BlockingCalls, all_or_none
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import EpisodeKey, EpisodePlayer, Limits, SamplingParams
from jaxgrpo.rollout.openings import Opening
from jaxgrpo.rollout.user_code import FaultyEnvironmentError
from jaxgrpo.samplers.base import Sampler
from jaxgrpo.types import Group, StopReason, Task, Trajectory

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How many things happen at once, and how much patience a misbehaving environment gets."""

    episodes_in_flight: int = 256
    environment_threads: int = 16
    step_deadline_seconds: float = 60.0
    max_retries: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("episodes_in_flight", 1),
            ("environment_threads", 1),
            ("max_retries", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.step_deadline_seconds <= 0:
            raise ValueError(
                f"step_deadline_seconds must be above 0, got {self.step_deadline_seconds}"
            )


@dataclasses.dataclass(frozen=True)
class DroppedGroup:
    """A task whose group is left out, because its opening or one of its episodes failed on every try; `error` is the last error, in one
    line."""

    task: Task
    error: str


@dataclasses.dataclass(frozen=True)
class RolloutResult:
    """What became of the tasks, in their order: scored groups, and dropped ones.

    `failures` holds every episode that its environment ended with an error, those included that a later try made good. `seconds` went by
    from the batch's start to its end.
    """

    groups: tuple[Group, ...]
    dropped: tuple[DroppedGroup, ...]
    failures: tuple[Trajectory, ...]
    seconds: float = 0.0

    @property
    def sampled_versions_T(self) -> np.ndarray:
        """The weight version of each sampled token of the groups, one after the other."""
        trajectories = [t for group in self.groups for t in group.trajectories]
        return np.concatenate(
            [np.zeros(0, np.int32), *(t.weight_versions_C[t.action_mask_C] for t in trajectories)]
        )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What stays the same from batch to batch. Batches that are played side by side share the places for episodes and the threads.

    Everything runs on one event loop, the sampler's. A synchronous program gives it one:

    with EventLoopThread() as loop:
        result = loop.call(Rollout(sampler, suite, chat).groups(tasks, group_size=8, seed=0, batch="step-1"))
    """

    sampler: Sampler
    suite: TaskSuite
    chat: Chat
    limits: Limits = Limits()
    sampling: SamplingParams = SamplingParams()
    execution: Execution = Execution()
    rewards: RewardSettings = RewardSettings()

    @functools.cached_property
    def _places(self) -> asyncio.Semaphore:
        """First come, first served: while batches overlap, a later one's episodes take the places that an earlier one leaves."""
        return asyncio.Semaphore(self.execution.episodes_in_flight)

    @functools.cached_property
    def _calls(self) -> BlockingCalls:
        return BlockingCalls(
            self.execution.environment_threads, self.execution.step_deadline_seconds
        )

    async def groups(
        self,
        tasks: Sequence[Task],
        group_size: int,
        seed: int,
        batch: str,
        progress: Progress | None = None,
    ) -> RolloutResult:
        """Play `group_size` episodes of each task.

        `batch` names this visit to the tasks: an episode's seeds come from the run's seed, the batch, its task and its sample index, and
        from nothing that runs beside it. `progress(done, total)` hears of episodes that are over, those of dropped groups included.
        Raises StuckCallsError when calls into the environment hang in too many threads.
        """
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        if len({task.id for task in tasks}) < len(tasks):
            raise ValueError(
                f"a task occurs twice in batch {batch!r}: its episodes would be the same; give it two batches"
            )
        start = time.perf_counter()
        played_with = (self.limits, self.sampling, self._calls, self.rewards)
        player = EpisodePlayer(self.sampler, self.suite, self.chat, *played_with)
        counter = _Counter(progress, len(tasks) * group_size)
        runner = _BatchRunner(
            player,
            self._places,
            self.execution.max_retries,
            EpisodeKey(seed, batch, "", 0),
            counter,
        )
        openings = await all_or_none([runner.open(task) for task in tasks])
        outcomes = await all_or_none(
            [
                runner.run_group(task, opening, group_size)
                for task, opening in zip(tasks, openings, strict=True)
            ]
        )
        position = {task.id: i for i, task in enumerate(tasks)}
        return RolloutResult(
            groups=tuple(outcome for outcome in outcomes if isinstance(outcome, Group)),
            dropped=tuple(outcome for outcome in outcomes if isinstance(outcome, DroppedGroup)),
            failures=tuple(
                sorted(
                    runner.failures,
                    key=lambda failure: (position[failure.task_id], failure.sample_index),
                )
            ),
            seconds=time.perf_counter() - start,
        )


class _TriesSpentError(Exception):
    """An episode's tries are spent; the message is the last one's error, in one line."""


class _BatchRunner:
    """One batch under way."""

    def __init__(
        self,
        player: EpisodePlayer,
        places: asyncio.Semaphore,
        max_retries: int,
        key: EpisodeKey,
        counter: "_Counter",
    ):
        self._player = player
        self._tries = 1 + max_retries
        self._in_flight = places
        self._key = key
        self._counter = counter
        self.failures: list[Trajectory] = []

    async def open(self, task: Task) -> Opening | DroppedGroup:
        error = ""
        for _ in range(self._tries):
            try:
                return await self._player.open(task)
            except FaultyEnvironmentError as faulty:
                error = str(faulty)
        return DroppedGroup(task, error)

    async def run_group(
        self, task: Task, opening: Opening | DroppedGroup, group_size: int
    ) -> Group | DroppedGroup:
        """All episodes of a task. The first one that fails for good cancels the others: the group is lost without it."""
        if isinstance(opening, DroppedGroup):
            self._counter.add(group_size)
            return opening
        finished = 0

        async def run(sample_index: int) -> Trajectory:
            nonlocal finished
            trajectory = await self._run_episode(task, opening, sample_index)
            finished += 1
            self._counter.add(1)
            return trajectory

        try:
            return Group(task, tuple(await all_or_none([run(i) for i in range(group_size)])))
        except _TriesSpentError as failed:
            self._counter.add(group_size - finished)
            return DroppedGroup(task, str(failed))

    async def _run_episode(self, task: Task, opening: Opening, sample_index: int) -> Trajectory:
        for attempt in range(self._tries):
            key = dataclasses.replace(
                self._key, task_id=task.id, sample_index=sample_index, attempt=attempt
            )
            async with self._in_flight:
                trajectory = await self._player.play(task, opening, key)
            if trajectory.stop_reason is not StopReason.ENVIRONMENT_ERROR:
                return trajectory
            self.failures.append(trajectory)
        raise _TriesSpentError(trajectory.error.partition("\n")[0])


class _Counter:
    """Counts the episodes that are over, and tells."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
