"""Select the tasks of a batch, and start rollouts before the trainer needs them.

Each trained batch makes a new version of the weights. If batch b is requested under version v, it
trains version v, and batch b + k trains version v + k at the latest (earlier if batches in between
are skipped). The batches up to b + max_staleness may therefore start under v: no token is then more
than `max_staleness` versions older than the weights that it trains. With 0, a batch starts when it
is requested.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from jaxgrpo.config.settings import ConfigError, RolloutSettings, TaskOrder
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.types import Task


def batches_per_epoch(tasks: int, tasks_per_step: int) -> int:
    """Return the number of whole batches in an epoch. Raises ConfigError if there is none."""
    if tasks < tasks_per_step:
        raise ConfigError(
            f"rollout.tasks_per_step is {tasks_per_step}, but the train split holds {tasks} tasks"
        )
    return tasks // tasks_per_step


def task_batch(
    tasks: Sequence[Task],
    tasks_per_step: int,
    seed: int,
    index: int,
    order: TaskOrder = RolloutSettings.task_order,
) -> list[Task]:
    """Return the tasks of batch `index`. Every epoch is a fresh shuffle, or the tasks as given, cut
    into whole batches. The result depends on the arguments alone, so that a run can resume."""
    per_epoch = batches_per_epoch(len(tasks), tasks_per_step)
    epoch, position = divmod(index, per_epoch)
    places = np.arange(len(tasks))
    if order == "shuffled":
        places = np.random.default_rng([seed, epoch]).permutation(len(tasks))
    return [tasks[i] for i in places[position * tasks_per_step : (position + 1) * tasks_per_step]]


class RolloutPrefetcher:
    """Returns the rollouts of the batches in order, beginning with batch `first`. Meanwhile the
    rollouts of up to `max_staleness` later batches run. Rollouts that were not returned are
    discarded: a resumed run samples their batches again."""

    def __init__(
        self,
        loop: EventLoopThread,
        run_rollout: Callable[[int], Coroutine[Any, Any, RolloutResult]],
        first: int,
        max_staleness: int,
    ) -> None:
        """`run_rollout` samples the batch of a number, on `loop`."""
        self._loop = loop
        self._run_rollout = run_rollout
        self._next = first
        self._max_staleness = max_staleness
        self._running: dict[int, asyncio.Task[RolloutResult]] = {}

    def next(self, left: int) -> RolloutResult:
        """Wait for the next batch. The run still needs `left` batches, this one included. Call this
        when the sampler serves the weights that the batch will train. Raises the exception of the
        rollout, if any."""
        return self._loop.call(self._hand_out(left))

    def close(self) -> None:
        """Cancel the running rollouts, and wait until they have cleaned up."""
        self._loop.call(self._cancel())

    async def _hand_out(self, left: int) -> RolloutResult:
        for number in range(self._next, self._next + min(self._max_staleness, left - 1) + 1):
            if number not in self._running:
                self._running[number] = asyncio.create_task(self._run_rollout(number))
        result = await self._running[self._next]
        del self._running[self._next]
        self._next += 1
        return result

    async def _cancel(self) -> None:
        for task in self._running.values():
            # an interrupted `next` has cancelled its batch; a second time would end its clean-up
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)


class StalenessError(SamplerError):
    """The sampler's tokens are older than training.max_staleness allows."""


def check_staleness(result: RolloutResult, version: int, max_staleness: int) -> None:
    """Raise StalenessError if a token of a batch that trains `version` is more than `max_staleness`
    versions older. Otherwise a sampler that ignores published weights would go unnoticed."""
    oldest = min((int(v) for v in result.sampled_versions_T), default=version)
    if version - oldest > max_staleness:
        raise StalenessError(
            f"the batch holds tokens of weight version {oldest}, but trains version {version}: "
            f"that is older than training.max_staleness ({max_staleness}) allows, so the sampler "
            "does not serve what was published"
        )
