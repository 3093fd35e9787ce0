"""Compute the flat metrics of one batch from its episodes and optimizer steps."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxgrpo.config.settings import Config
from jaxgrpo.learner.optimizer import learning_rates
from jaxgrpo.learner.train_state import StepReport
from jaxgrpo.rollout.prefetch import batches_per_epoch
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.types import MicroBatch, StopReason


def rollout_metrics(
    result: RolloutResult, skipped: Sequence[RolloutResult], version: int
) -> dict[str, float | int | str]:
    """Return the metrics of a batch's episodes. The faults of the batches `skipped` before it count
    here. `version` is that of the weights about to be trained; the staleness of a token is the
    number of versions by which it is older.
    """
    trajectories = [t for group in result.groups for t in group.trajectories]
    staleness = version - result.sampled_versions_T
    tokens = np.array([len(t.completion_ids_C) for t in trajectories])
    metrics: dict[str, float | int | str] = {
        "train/reward_mean": float(np.mean([g.rewards_G.mean() for g in result.groups])),
        **_reward_spread([g.rewards_G for g in result.groups]),
        "train/pass_rate": float(
            np.mean([t.score is not None and t.score.passed for t in trajectories])
        ),
        "train/no_signal_fraction": float(
            np.mean([np.ptp(g.rewards_G) == 0 for g in result.groups])
        ),
        "train/groups": len(result.groups),
        "train/skipped_batches": len(skipped),
        "train/dropped_groups": sum(len(r.dropped) for r in (*skipped, result)),
        "train/environment_errors": sum(len(r.failures) for r in (*skipped, result)),
        "train/completion_tokens_mean": float(tokens.mean()),
        "train/completion_tokens_max": int(tokens.max()),
        "train/prompt_tokens_mean": float(np.mean([len(g.prompt_ids_P) for g in result.groups])),
        "train/turns_mean": float(np.mean([t.turns for t in trajectories])),
        "train/tool_calls_mean": float(np.mean([len(t.calls) for t in trajectories])),
        "train/overlong_fraction": float(np.mean([t.overlong for t in trajectories])),
        "train/staleness_mean": float(np.mean(staleness)),
        "train/staleness_max": int(np.max(staleness)),
        "time/rollout_seconds": result.seconds,
        "speed/sampled_tokens_per_second": len(staleness) / result.seconds,
    }
    for reason in StopReason:
        metrics[f"stop/{reason}"] = float(np.mean([t.stop_reason is reason for t in trajectories]))
    for part in sorted({name for t in trajectories if t.score for name in t.score.parts}):
        metrics[f"reward/{part}"] = float(
            np.mean([t.score.parts.get(part, 0.0) for t in trajectories if t.score])
        )
    return metrics


def _reward_spread(rewards_NG: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the mean over groups of the standard deviation of a group, with G - 1 in its
    denominator as in the advantages, and quantiles over all episodes."""
    low, quarter, median, three_quarters, high = np.quantile(
        np.concatenate(rewards_NG), [0, 0.25, 0.5, 0.75, 1]
    )
    return {
        "train/reward_std": float(np.mean([rewards_G.std(ddof=1) for rewards_G in rewards_NG])),
        "train/reward_min": float(low),
        "train/reward_q25": float(quarter),
        "train/reward_median": float(median),
        "train/reward_q75": float(three_quarters),
        "train/reward_max": float(high),
    }


def progress_metrics(
    config: Config, tasks: int, batch: int, step: int
) -> dict[str, float | int | str]:
    """Return how far the run is after batch number `batch`, counted from 1, was trained up to
    `step`: the epoch, and the learning rate of that step."""
    return {
        "train/epoch": batch / batches_per_epoch(tasks, config.rollout.tasks_per_step),
        "train/learning_rate": float(learning_rates(config.optimizer)(step - 1)),
    }


def update_metrics(
    micro_batches: Sequence[MicroBatch],
    reports: Sequence[StepReport],
    compilations: int,
    seconds: Mapping[str, float],
) -> dict[str, float | int | str]:
    """Return the metrics of the optimizer steps on a batch.

    - Loss, KL, entropy and the sampler's mismatch are those of the first step, which is on-policy.
    - The clip fraction is that of the last step, since that of the first is zero by construction.
    - The gradient norm is the mean over the steps that were taken.
    - `real_token_fraction`: real tokens per position computed, padding included.
    - `prompt_sharing`: how many times as many real tokens there would be with the prompt repeated
      in every row.
    """
    taken = [report for report in reports if report.taken]
    first = taken[0].sums.summary()
    completions = sum(int(b.completion_lengths_NG.sum()) for b in micro_batches)
    real = completions + sum(
        int(b.prompt_lengths_N[b.completion_lengths_NG.any(axis=1)].sum()) for b in micro_batches
    )
    computed = sum(b.prompt_NP.size + b.completions_NGC.size for b in micro_batches)
    repeated = sum(
        int(
            (
                b.completion_lengths_NG
                + b.prompt_lengths_N[:, None] * (b.completion_lengths_NG > 0)
            ).sum()
        )
        for b in micro_batches
    )
    return {
        **{f"train/{key}": value for key, value in first.items()},
        "train/clip_fraction": taken[-1].sums.summary()["clip_fraction"],
        "train/grad_norm": float(np.mean([r.grad_norm for r in taken])),
        "train/skipped_steps": len(reports) - len(taken),
        "train/real_token_fraction": real / computed,
        "train/forwarded_per_completion_token": computed / completions,
        "train/prompt_sharing": repeated / real,
        "train/compilations": compilations,
        "time/reference_seconds": seconds["reference"],
        "time/update_seconds": seconds["update"],
        "time/probe_seconds": seconds["probe"],
        "time/publish_seconds": seconds["publish"],
        "speed/trained_tokens_per_second": real * len(reports) / seconds["update"],
    }


def schedule_metrics(
    seconds: Mapping[str, float], sampler_idle_fraction: float
) -> dict[str, float | int | str]:
    """Return the time of a batch without evaluations, and the fraction of it in which each side was
    idle: the trainer waiting for rollouts, the sampler without a request. The times for recording
    and for a checkpoint are those of the batch before."""
    whole = seconds["all"] - seconds.get("evaluate", 0.0)
    return {
        "time/batch_seconds": whole,
        "time/wait_seconds": seconds["wait"],
        "time/record_seconds": seconds.get("record", 0.0),
        "time/checkpoint_seconds": seconds.get("checkpoint", 0.0),
        "time/trainer_idle_fraction": seconds["wait"] / whole,
        "time/sampler_idle_fraction": sampler_idle_fraction,
    }
