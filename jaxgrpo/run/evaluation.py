"""Evaluate a policy: sample several episodes of each task of a split and compute the pass rates."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.rollout import Rollout, RolloutResult
from jaxgrpo.run.pass_rates import mean_pass_at_k, pass_rate, pass_rates_by_label
from jaxgrpo.run.skipping import AllGroupsDroppedError
from jaxgrpo.types import Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The flat metrics of an evaluation, and its episodes."""

    metrics: dict[str, float | int | str]
    result: RolloutResult

    @property
    def headline(self) -> str:
        m = self.metrics
        interval = f"[{m['eval/pass_rate_low']:.1%}, {m['eval/pass_rate_high']:.1%}]"
        return (
            f"{m['eval/split']}: pass@1 {m['eval/pass_rate']:.1%} {interval} "
            f"over {m['eval/tasks']} tasks x {m['eval/samples']} samples"
        )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates the policy that the rollout's sampler serves, with `samples` episodes per task.
    `progress` gets the number of finished episodes and of all."""

    rollout: Rollout
    loop: EventLoopThread
    samples: int
    seed: int
    progress: Callable[[int, int], None]

    def evaluate(self, tasks: Sequence[Task], split: str, step: int) -> Evaluation:
        """Sample the tasks of a split. `step` is that of the weights, and the seeds of the episodes
        depend on it. The rates leave out dropped groups. Raises AllGroupsDroppedError if all were
        dropped."""
        result = self.loop.call(
            self.rollout.groups(
                tasks, self.samples, self.seed, f"eval-{step}/{split}", self.progress
            )
        )
        if not result.groups:
            raise AllGroupsDroppedError(f"the {split} split", result)
        return Evaluation(_metrics(result, split, self.samples), result)


def _metrics(result: RolloutResult, split: str, samples: int) -> dict[str, float | int | str]:
    passed_NK = np.array(
        [[t.score is not None and t.score.passed for t in g.trajectories] for g in result.groups]
    )
    rate = pass_rate(passed_NK)
    trajectories = [t for g in result.groups for t in g.trajectories]
    tokens = [len(t.completion_ids_C) for t in trajectories]
    metrics: dict[str, float | int | str] = {
        "eval/split": split,
        "eval/pass_rate": rate.rate,
        "eval/pass_rate_low": rate.low,
        "eval/pass_rate_high": rate.high,
        "eval/reward_mean": float(np.mean([g.rewards_G.mean() for g in result.groups])),
        "eval/tasks": len(result.groups),
        "eval/samples": samples,
        "eval/dropped_groups": len(result.dropped),
        "eval/overlong_fraction": float(np.mean([t.overlong for t in trajectories])),
        "eval/completion_tokens_mean": float(np.mean(tokens)),
    }
    k = 2
    while k <= samples:
        metrics[f"eval/pass_at_{k}"] = mean_pass_at_k(passed_NK, k)
        k *= 2
    by_label = pass_rates_by_label(passed_NK, [g.task.labels for g in result.groups])
    return metrics | {f"eval/pass_rate/{label}": value.rate for label, value in by_label.items()}
