"""Sample the episodes of many groups concurrently: a batch of tasks in, scored groups out.

An episode whose environment fails is retried in a fresh environment with fresh seeds. When all
tries have failed, the whole group is dropped and counted; a failure never becomes a reward. An
exception of the sampler ends the rollout, after all other episodes are cancelled and released.
"""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.environment import TaskSuite
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import BlockingCalls, gather_or_cancel
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import EpisodeKey, EpisodeRunner, Limits, SamplingParams
from jaxgrpo.rollout.openings import Opening, Places, places_of
from jaxgrpo.rollout.user_code import FaultyEnvironmentError
from jaxgrpo.samplers.base import Sampler
from jaxgrpo.types import Group, StopReason, Task, Trajectory

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class DroppedGroup:
    """A task whose group is dropped, because its opening or one of its episodes failed on every
    try. `error` is the last error, in one line."""

    task: Task
    error: str


@dataclasses.dataclass(frozen=True)
class RolloutResult:
    """The scored groups and the dropped ones, in the order of their tasks.

    `failures` holds every episode that ended with an error of its environment, also if a later try
    succeeded. `seconds` is the time that the batch took.
    """

    groups: tuple[Group, ...]
    dropped: tuple[DroppedGroup, ...]
    failures: tuple[Trajectory, ...]
    seconds: float = 0.0

    @property
    def sampled_versions_T(self) -> np.ndarray:
        """The weight version of each sampled token of the groups, concatenated."""
        trajectories = [t for group in self.groups for t in group.trajectories]
        return np.concatenate(
            [np.zeros(0, np.int32), *(t.weight_versions_C[t.action_mask_C] for t in trajectories)]
        )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Samples batches of tasks. Concurrent batches share `settings.max_in_flight` and the threads.

    Everything runs on the event loop of the sampler. A synchronous program provides one:

    with EventLoopThread() as loop:
        rollout = Rollout(sampler, suite, chat, context_length)
        result = loop.call(rollout.groups(tasks, group_size=8, seed=0, batch="step-1"))
    """

    sampler: Sampler
    suite: TaskSuite
    chat: Chat
    context_length: int
    settings: RolloutSettings = RolloutSettings()
    sampling: SamplingParams = SamplingParams()
    rewards: RewardSettings = RewardSettings()
    beside: "Rollout | None" = None
    """Another rollout that may run meanwhile. If its suite is the same, both share the limit of
    open environments."""

    @functools.cached_property
    def _places(self) -> asyncio.Semaphore:
        """First come, first served: episodes of a later batch use the places that an earlier batch
        leaves free."""
        return asyncio.Semaphore(self.settings.max_in_flight)

    @functools.cached_property
    def _open_places(self) -> Places:
        if self.beside is not None and self.beside.suite == self.suite:
            return self.beside._open_places
        return places_of(self.suite)

    @functools.cached_property
    def _calls(self) -> BlockingCalls:
        return BlockingCalls(self.settings.environment_threads, self.settings.step_deadline_seconds)

    async def groups(
        self,
        tasks: Sequence[Task],
        group_size: int,
        seed: int,
        batch: str,
        progress: Progress | None = None,
    ) -> RolloutResult:
        """Sample `group_size` episodes of each task.

        The seeds of an episode depend only on the run's seed, on `batch`, which names this visit to
        the tasks, on the task and on the sample index. `progress(done, total)` is called as
        episodes end, those of dropped groups included. Raises StuckCallsError if calls into the
        environment hang in too many threads.
        """
        _check_groups(tasks, group_size, batch)
        start = time.perf_counter()
        runner = _BatchRunner(
            self._episode_runner(),
            self._places,
            self.settings.max_retries,
            EpisodeKey(seed, batch, "", 0),
            _Counter(progress, len(tasks) * group_size),
        )
        openings = await gather_or_cancel([runner.open(task) for task in tasks])
        outcomes = await gather_or_cancel(
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

    def _episode_runner(self) -> EpisodeRunner:
        return EpisodeRunner(
            self.sampler,
            self.suite,
            self.chat,
            Limits(self.settings, self.context_length),
            self.sampling,
            self._calls,
            self.rewards,
            self._open_places,
        )


def _check_groups(tasks: Sequence[Task], group_size: int, batch: str) -> None:
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if len({task.id for task in tasks}) < len(tasks):
        raise ValueError(
            f"a task occurs twice in batch {batch!r}: its episodes would be the same; put it into "
            "two batches"
        )


class _TriesSpentError(Exception):
    """Every try of an episode failed. The message is the last error, in one line."""


class _BatchRunner:
    """Runs one batch."""

    def __init__(
        self,
        episodes: EpisodeRunner,
        places: asyncio.Semaphore,
        max_retries: int,
        key: EpisodeKey,
        counter: "_Counter",
    ):
        self._episodes = episodes
        self._tries = 1 + max_retries
        self._in_flight = places
        self._key = key
        self._counter = counter
        self.failures: list[Trajectory] = []

    async def open(self, task: Task) -> Opening | DroppedGroup:
        error = ""
        for _ in range(self._tries):
            try:
                return await self._episodes.open(task)
            except FaultyEnvironmentError as faulty:
                error = str(faulty)
        return DroppedGroup(task, error)

    async def run_group(
        self, task: Task, opening: Opening | DroppedGroup, group_size: int
    ) -> Group | DroppedGroup:
        """Run all episodes of a task. The first one whose tries all fail cancels the others,
        because the group is then dropped."""
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
            return Group(task, tuple(await gather_or_cancel([run(i) for i in range(group_size)])))
        except _TriesSpentError as failed:
            self._counter.add(group_size - finished)
            return DroppedGroup(task, str(failed))

    async def _run_episode(self, task: Task, opening: Opening, sample_index: int) -> Trajectory:
        for attempt in range(self._tries):
            key = dataclasses.replace(
                self._key, task_id=task.id, sample_index=sample_index, attempt=attempt
            )
            async with self._in_flight:
                trajectory = await self._episodes.run(task, opening, key)
            if trajectory.stop_reason is not StopReason.ENVIRONMENT_ERROR:
                return trajectory
            self.failures.append(trajectory)
        raise _TriesSpentError(trajectory.error.partition("\n")[0])


class _Counter:
    """Counts finished episodes and reports them."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
