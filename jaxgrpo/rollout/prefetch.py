"""Which tasks make up a batch, and when it is played: when it is asked for, or while the trainer
still works on those before it.

Weights have versions, and each batch that is trained on makes the next one. When batch b is asked for under version v, it is trained on
by v, and batch b + k by v + k at the latest (earlier when batches in between are lost to failing environments). So the batches up to
b + max_staleness may start under v: whatever is sampled for them from then on is at most `max_staleness` versions older than the weights
that it trains. 0 is the synchronous schedule: a batch starts when it is asked for.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.types import Task


def batches_per_epoch(tasks: int, tasks_per_step: int) -> int:
    """Whole batches in one pass over the tasks. Raises ConfigError when there is not even one."""
    if tasks < tasks_per_step:
        raise ConfigError(
            f"rollout.tasks_per_step is {tasks_per_step}, but the train split holds {tasks} tasks"
        )
    return tasks // tasks_per_step


def task_batch(
    tasks: Sequence[Task], tasks_per_step: int, seed: int, index: int, shuffle: bool = True
) -> list[Task]:
    """The tasks of batch `index`: every epoch is a fresh shuffle, or the tasks as given, cut into
    whole batches. A pure function, so that a run can resume."""
    per_epoch = batches_per_epoch(len(tasks), tasks_per_step)
    epoch, position = divmod(index, per_epoch)
    order = np.arange(len(tasks))
    if shuffle:
        order = np.random.default_rng([seed, epoch]).permutation(len(tasks))
    return [tasks[i] for i in order[position * tasks_per_step : (position + 1) * tasks_per_step]]


class RolloutsAhead:
    """Consumes the numbers of batches, from `first` on; waits for the rollout of the batch that is asked for; produces its result, while
    the rollouts of up to `max_staleness` batches after it go on. A number is handed out once, in order, and what was not handed out
    leaves no trace: a run that was cut off plays it again."""

    def __init__(
        self,
        loop: EventLoopThread,
        play: Callable[[int], Coroutine[Any, Any, RolloutResult]],
        first: int,
        max_staleness: int,
    ) -> None:
        """`play` is the rollout of one batch, to be run on `loop`."""
        self._loop = loop
        self._play = play
        self._next = first
        self._max_staleness = max_staleness
        self._under_way: dict[int, asyncio.Task[RolloutResult]] = {}

    def next(self, left: int) -> RolloutResult:
        """The next batch, the first of `left` that the run still needs. To be asked for once the weights that it will train are served.

        Raises what its rollout raised.
        """
        return self._loop.call(self._hand_out(left))

    def close(self) -> None:
        """Cancel what is under way, and let it clean up."""
        self._loop.call(self._cancel())

    async def _hand_out(self, left: int) -> RolloutResult:
        for number in range(self._next, self._next + min(self._max_staleness, left - 1) + 1):
            if number not in self._under_way:
                self._under_way[number] = asyncio.create_task(self._play(number))
        result = await self._under_way[self._next]
        del self._under_way[self._next]
        self._next += 1
        return result

    async def _cancel(self) -> None:
        for task in self._under_way.values():
            if not task.cancelling():  # a wait that was interrupted has cancelled its batch: a second time would cut its cleaning up short
                task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)


class StalenessError(SamplerError):
    """The sampler's tokens are older than the schedule can make them."""


def check_staleness(result: RolloutResult, version: int, max_staleness: int) -> None:
    """The schedule's bound, for the oldest token of a batch about to train weights of `version`. Raises StalenessError beyond it: a sampler
    that does not take up what is published would go unnoticed otherwise."""
    oldest = min((int(v) for v in result.sampled_versions_T), default=version)
    if version - oldest > max_staleness:
        raise StalenessError(
            f"the batch holds tokens of weight version {oldest}, but trains version {version}: that is older than training.max_staleness "
            f"({max_staleness}) allows, so the sampler does not serve what was published"
        )
