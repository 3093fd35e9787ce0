"""Estimate the time that is left of a run, from the stages that it still has.

A run is a list of stages: evaluations of a split, and batches. The cost of a stage is estimated
from the stages of its kind that have ended. Compilation is left out, because most programs are
compiled once, in the first stages. Until a batch has been trained, nothing is known about the cost
of one. The estimate is then only a lower bound, and says so.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from jaxgrpo.config.settings import Config
from jaxgrpo.run.metrics import Metrics, evaluated_episodes

BATCH = ""
"""The stage of a batch. Other stages are evaluations, and bear the name of their split."""
_FEWEST = 3


def duration(seconds: float) -> str:
    """Return seconds as a text: "45 s", "12 min", "3 h 05 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The seconds that are left, or at least left if not all costs are known."""

    seconds: float
    complete: bool = True

    def __str__(self) -> str:
        if not self.complete and self.seconds < 1:
            return "time left not known yet"
        return f"{'' if self.complete else 'at least '}{duration(self.seconds)} left"


def stages_from(config: Config, splits: Sequence[str], step: int, advance: int = 0) -> list[str]:
    """Return the stages that a run at `step` still has, those that are due at this step included.
    `splits` are evaluated, in this order. `advance` is the number of optimizer steps on the last
    batch, 0 before the first."""
    e, t, stages = config.evaluation, config.training, list[str]()
    if step == 0 and e.before and not advance:
        stages += splits
    while True:
        if step >= t.steps:
            return stages + list(splits) * (e.after and advance > 0)
        if advance and e.every is not None and step // e.every > (step - advance) // e.every:
            stages += splits
        stages.append(BATCH)
        advance = min(t.iterations, t.steps - step)
        step += advance


class TimeLeft:
    """Follows the stages of a run. One thread changes it, and any thread may ask it."""

    def __init__(
        self,
        config: Config,
        tasks: Mapping[str, int],
        compiled: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
        started: float | None = None,
    ):
        """`tasks` has the number of tasks of each split that is evaluated, in their order.
        `compiled` returns the seconds spent on compilation so far. The run started at `started` by
        the clock, or now."""
        self._config, self._compiled, self._clock = config, compiled, clock
        rollout, samples = config.rollout, config.evaluation.samples
        self._splits = list(tasks)
        self._episodes = {split: count * samples for split, count in tasks.items()}
        self._episodes[BATCH] = rollout.tasks_per_step * rollout.group_size
        self._earlier: list[float] = []
        self._batches: list[float] = []
        self._evaluations: dict[str, list[float]] = {}  # seconds per episode, of each time
        self._rollouts: list[float] = []  # seconds per episode
        self._done: float = 0
        self._before = 0.0
        self._started = clock() if started is None else started
        self.begin(0, ())

    def begin(self, step: int, history: Sequence[Metrics]) -> None:
        """Begin at `step`, whose run has written the lines of `history`."""
        for line in history:
            self._before = max(self._before, _number(line, "time/elapsed_seconds"))
            if "time/batch_seconds" in line:
                compiled = _number(line, "time/compile_seconds")
                self._earlier.append(max(_number(line, "time/batch_seconds") - compiled, 0.0))
                rollout = _number(line, "time/rollout_seconds") / self._episodes[BATCH]
                self._rollouts.append(rollout)
            elif "eval/seconds" in line and (episodes := evaluated_episodes(line)):
                self._add(str(line["eval/split"]), _number(line, "eval/seconds") / episodes)
        self._step, self._stages = step, stages_from(self._config, self._splits, step)
        self._next_stage()

    def _next_stage(self) -> None:
        self._done = 0
        self._began, self._compiled_before = self._clock(), self._compiled()

    @property
    def stage(self) -> str | None:
        """The current stage, None after the last one."""
        return next(iter(self._stages), None)

    @property
    def compiled(self) -> float:
        """The seconds spent on compilation in the current stage."""
        return self._compiled() - self._compiled_before

    @property
    def elapsed(self) -> float:
        """The seconds since the run's start, those before it was resumed included."""
        return self._before + self._clock() - self._started

    def episodes(self, done: int, total: int) -> None:
        """Note how many episodes of the current stage have ended."""
        self._done = done / max(total, 1)

    def end_batch(self, step: int, rollout_seconds: float) -> None:
        """End the stage of a batch that was trained up to `step`."""
        self._rollouts = [*self._rollouts, rollout_seconds / self._episodes[BATCH]]
        self._batches = [*self._batches, self._seconds()]
        self._step, advance = step, step - self._step
        self._stages = stages_from(self._config, self._splits, step, advance)
        self._next_stage()

    def end_evaluation(self, split: str) -> None:
        """End the evaluation of a split."""
        self._add(split, self._seconds() / self._episodes[split])
        if self.stage == split:
            self._stages = self._stages[1:]
        self._next_stage()

    def _add(self, split: str, per_episode: float) -> None:
        times = [*self._evaluations.get(split, ()), per_episode][-_FEWEST:]
        self._evaluations = {**self._evaluations, split: times}

    def estimate(self) -> Estimate:
        """Estimate the time to the end of the last stage."""
        stages = self._stages
        if not stages:
            return Estimate(0.0)
        costs = {stage: self._cost(stage) for stage in set(stages)}
        stage, cost = stages[0], costs[stages[0]]
        now = self._rest(stage, cost)
        later = sum(costs[of] or self._least(of) for of in stages[1:])
        known = cost is not None or (stage != BATCH and self._done > 0)
        return Estimate(now + later, known and all(costs[of] is not None for of in stages[1:]))

    def _seconds(self) -> float:
        """Return how long the current stage has taken, without compilation."""
        return max(self._clock() - self._began - self.compiled, 0.0)

    def _cost(self, stage: str) -> float | None:
        """Return the seconds of a whole stage, None if they are not known."""
        if stage == BATCH:
            # the first batch may hold more start-up costs than compilation
            measured = self._batches[1:] or self._earlier + self._batches
            recent = measured[-max(len(measured) // 2, _FEWEST) :]
            return sum(recent) / len(recent) if recent else None
        known = [self._rollouts[-_FEWEST:], *self._evaluations.values()]
        times = self._evaluations.get(stage, known[-1])
        return statistics.median(times) * self._episodes[stage] if times else None

    def _least(self, stage: str) -> float:
        """Return the seconds of the stage's episodes, at the rate of any evaluation."""
        times = next(iter(self._evaluations.values()), [0.0])
        return statistics.median(times) * self._episodes[stage]

    def _rest(self, stage: str, cost: float | None) -> float:
        """Return the seconds left of the current stage, which costs `cost` as a whole."""
        seconds, done = self._seconds(), self._done
        if stage == BATCH:
            return max((cost or self._least(stage)) - seconds, 0.0)
        if cost is not None and done < 0.25:
            return cost * (1 - done)
        return seconds / done * (1 - done) if done else 0.0


def _number(line: Metrics, key: str) -> float:
    value = line.get(key, 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0
