"""python -m jaxgrpo.evaluate --config FILE [--checkpoint RUN] --split test --samples K: pass rate on a split, with its interval."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxgrpo import records
from jaxgrpo.background import EventLoopThread
from jaxgrpo.checkpoint import read_policy
from jaxgrpo.config import SPLITS, Config, ConfigError, load_config
from jaxgrpo.metrics import Recorder, TerminalView
from jaxgrpo.rollout import Decoding, Rollout, RolloutResult
from jaxgrpo.setup import build_rollout, build_sampler, build_update, initial_params, open_policy, run_folder
from jaxgrpo.sharding import store
from jaxgrpo.statistics import mean_pass_at_k, pass_rate, pass_rates_by_label
from jaxgrpo.types import Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `samples` episodes of each task of a split came to: flat metrics, and the episodes themselves."""

    metrics: dict[str, float | int | str]
    result: RolloutResult

    @property
    def headline(self) -> str:
        m = self.metrics
        return (
            f"{m['eval/split']}: pass@1 {m['eval/pass_rate']:.1%} [{m['eval/pass_rate_low']:.1%}, {m['eval/pass_rate_high']:.1%}] "
            f"over {m['eval/tasks']} tasks x {m['eval/samples']} samples"
        )


def split_tasks(config: Config, split: str) -> Sequence[Task]:
    """The tasks of a split that evaluation looks at."""
    return config.environment.tasks(split)[: config.evaluation.tasks]


def evaluate(
    rollout: Rollout,
    loop: EventLoopThread,
    tasks: Sequence[Task],
    *,
    split: str,
    samples: int,
    seed: int,
    name: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Play `samples` episodes of each task and sum them up. `name` tells this evaluation's seeds from others'. Dropped groups are counted
    and left out of the rates. Raises RuntimeError when no group was left."""
    result = loop.call(rollout.groups(tasks, samples, seed, f"{name}/{split}", progress))
    if not result.groups:
        raise RuntimeError(f"every group of the {split} split was dropped; the last error:\n{result.dropped[-1].error}")
    passed_NK = np.array([[t.score is not None and t.score.passed for t in g.trajectories] for g in result.groups])
    rate = pass_rate(passed_NK)
    trajectories = [t for g in result.groups for t in g.trajectories]
    metrics: dict[str, float | int | str] = {
        "eval/split": split,
        "eval/pass_rate": rate.rate,
        "eval/pass_rate_low": rate.low,
        "eval/pass_rate_high": rate.high,
        "eval/reward_mean": float(np.mean([g.rewards_G.mean() for g in result.groups])),
        "eval/tasks": len(result.groups),
        "eval/samples": samples,
        "eval/dropped_groups": len(result.dropped),
        "eval/overlong_share": float(np.mean([t.overlong for t in trajectories])),
        "eval/completion_tokens_mean": float(np.mean([len(t.completion_ids_C) for t in trajectories])),
    }
    k = 2
    while k <= samples:
        metrics[f"eval/pass_at_{k}"] = mean_pass_at_k(passed_NK, k)
        k *= 2
    for label, value in pass_rates_by_label(passed_NK, [g.task.labels for g in result.groups]).items():
        metrics[f"eval/pass_rate/{label}"] = value.rate
    return Evaluation(metrics, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxgrpo.evaluate", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. evaluation.temperature=0")
    parser.add_argument("--checkpoint", metavar="RUN", help="a run's folder; without it the config's own model is evaluated")
    parser.add_argument("--step", type=int, help="which of the run's checkpoints (default: the newest)")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--samples", type=int, help="episodes a task (default: the config's evaluation.samples)")
    parser.add_argument("--run-dir", help="where to record (default: runs/NAME-eval-SPLIT)")
    args = parser.parse_args(arguments)
    try:
        config = load_config(args.config, args.set)
        samples = config.evaluation.samples if args.samples is None else args.samples
        if samples < 1:
            raise ConfigError(f"--samples must be at least 1, got {samples}")
        _evaluate_once(config, args.checkpoint, args.step, args.split, samples, args.run_dir)
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate_once(config: Config, checkpoint: str | None, step: int | None, split: str, samples: int, run_dir: str | None) -> None:
    policy = open_policy(config)
    update = build_update(config, policy.config)
    if checkpoint is not None:
        params, at_step = read_policy(Path(checkpoint) / "checkpoints", update, step)
    else:
        params, at_step = store(initial_params(policy), update.layout, update.mesh), 0
    folder = run_folder(config, run_dir or f"runs/{config.name}-eval-{split}")
    recorder = Recorder(folder, tensorboard=False, wandb_project=None, name=config.name)
    tasks = split_tasks(config, split)
    decoding = Decoding(config.evaluation.temperature, config.evaluation.top_p)
    with EventLoopThread() as loop, TerminalView(len(tasks) * samples, unit="episode") as view:
        sampler = build_sampler(config, policy, update, params, version=at_step // config.training.iterations)
        rollout = build_rollout(config, policy, sampler, decoding)
        view.begin(0)
        outcome = evaluate(
            rollout, loop, tasks, split=split, samples=samples, seed=config.seed, name=f"eval-{at_step}", progress=view.progress
        )
        loop.call(sampler.close())
    recorder.record(at_step, outcome.metrics)
    recorder.close()
    records.write(folder / "trajectories" / f"{split}-{at_step:06d}.jsonl.gz", outcome.result, split, at_step)
    for key, value in outcome.metrics.items():
        print(f"{key:40} {value:.4f}" if isinstance(value, float) else f"{key:40} {value}")
    print(outcome.headline)


if __name__ == "__main__":
    sys.exit(main())
