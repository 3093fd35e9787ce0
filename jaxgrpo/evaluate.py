"""python -m jaxgrpo.evaluate --config FILE [--checkpoint RUN] --split test --samples K: pass rate on a split, with its interval."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import NO_LORA, SPLITS, Config, ConfigError
from jaxgrpo.interruptions import interruptible, run_program
from jaxgrpo.learner.sharding import store
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.paths import absolute
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.rollout import Rollout, RolloutResult
from jaxgrpo.run import records
from jaxgrpo.run.agreement import agreement_check
from jaxgrpo.run.folder import held
from jaxgrpo.run.metrics import Recorder, TerminalView
from jaxgrpo.run.pass_rates import mean_pass_at_k, pass_rate, pass_rates_by_label
from jaxgrpo.run.samplers import open_sampler
from jaxgrpo.run.setup import (
    ModelAssets,
    build_rollout,
    build_update,
    check_episodes,
    check_rewards,
    compute_dtype,
    enable_compilation_cache,
    initial_params,
    make_run_folder,
    open_model_assets,
    open_tasks,
    restrict_gpus,
    run_folder,
)
from jaxgrpo.run.skipping import NothingLeftError
from jaxgrpo.run.weights import WholeWeights
from jaxgrpo.samplers.base import Sampler, SamplerError
from jaxgrpo.storage.checkpoint import read_policy
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
    """The tasks of a split that evaluation looks at. Raises ConfigError when there are none."""
    tasks = open_tasks(config, split)[: config.evaluation.tasks]
    if not tasks:
        raise ConfigError(
            f"the {split} split of the environment is empty: there is nothing to evaluate"
        )
    return tasks


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
    and left out of the rates. Raises NothingLeftError when no group was left."""
    result = loop.call(rollout.groups(tasks, samples, seed, f"{name}/{split}", progress))
    if not result.groups:
        raise NothingLeftError(f"the {split} split", result)
    passed_NK = np.array(
        [[t.score is not None and t.score.passed for t in g.trajectories] for g in result.groups]
    )
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
        "eval/overlong_fraction": float(np.mean([t.overlong for t in trajectories])),
        "eval/completion_tokens_mean": float(
            np.mean([len(t.completion_ids_C) for t in trajectories])
        ),
    }
    k = 2
    while k <= samples:
        metrics[f"eval/pass_at_{k}"] = mean_pass_at_k(passed_NK, k)
        k *= 2
    for label, value in pass_rates_by_label(
        passed_NK, [g.task.labels for g in result.groups]
    ).items():
        metrics[f"eval/pass_rate/{label}"] = value.rate
    return Evaluation(metrics, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxgrpo.evaluate", description=__doc__)
    of_config = "a Python file with get_config(), or the config.json of a run"
    parser.add_argument("--config", required=True, help=of_config)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. evaluation.temperature=0",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="RUN",
        help="a run's folder; without it the config's own model is evaluated",
    )
    parser.add_argument(
        "--step", type=int, help="which of the run's checkpoints (default: the newest)"
    )
    parser.add_argument("--split", default="test", help=f"{' or '.join(SPLITS)} (default: test)")
    parser.add_argument(
        "--samples", type=int, help="episodes a task (default: the config's evaluation.samples)"
    )
    parser.add_argument("--run-dir", help="where to record (default: runs/NAME-eval-SPLIT)")
    args = parser.parse_args(arguments)
    start = Path.cwd()  # now: a config file or an environment may change it
    try:
        config = load_config(args.config, args.set)
        restrict_gpus(config)
        enable_compilation_cache(config)
        samples = config.evaluation.samples if args.samples is None else args.samples
        _check_arguments(args.split, samples, args.checkpoint, args.step)
        folder = run_folder(args.run_dir, f"{config.name}-eval-{args.split}", start)
        checkpoint = args.checkpoint and absolute(args.checkpoint, start)
        with interruptible(), held(folder):
            _evaluate_once(config, checkpoint, args.step, args.split, samples, folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NothingLeftError, SamplerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _check_arguments(split: str, samples: int, checkpoint: str | None, step: int | None) -> None:
    problems = []
    if split not in SPLITS:
        problems.append(f"--split must be {' or '.join(SPLITS)}, got {split!r}")
    if not 1 <= samples < 2**31:
        problems.append(f"--samples must be from 1 to {2**31 - 1}, got {samples}")
    if step is not None and checkpoint is None:
        problems.append(
            f"--step {step} names one of a run's checkpoints: give the run's folder with --checkpoint"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def _read_weights(
    config: Config, assets: ModelAssets, checkpoint: Path | None, step: int | None
) -> tuple[Params, int]:
    """The weights to evaluate in the logical tree, and the step they are of: a checkpoint's, or the config's own model at step 0."""
    dtype = compute_dtype(config)
    if checkpoint is None:
        return initial_params(assets, dtype), 0
    try:
        base = functools.partial(initial_params, assets, dtype)
        params, at_step = read_policy(checkpoint / "checkpoints", assets.config, step, base)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"--checkpoint {checkpoint}: {error}") from error
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params), at_step


def _check_sampler(
    config: Config,
    assets: ModelAssets,
    params: Params,
    version: int,
    prompt_ids_P: np.ndarray,
    loop: EventLoopThread,
    sampler: Sampler,
) -> dict[str, float]:
    """As training does, on one device and with whole weights: adapters have been merged. Raises MismatchError when the sampler serves
    other weights than those to be evaluated."""
    on_one = dataclasses.replace(config.training, devices=1, groups_per_device=1)
    update = build_update(dataclasses.replace(config, training=on_one, lora=NO_LORA), assets.config)
    check = agreement_check(config, update, prompt_ids_P)
    if check is None:
        return {}
    return check.run(
        loop, sampler, store(params, update.layout, update.mesh, update.compute_dtype), version
    )


def _evaluate_once(
    config: Config,
    checkpoint: Path | None,
    step: int | None,
    split: str,
    samples: int,
    folder: Path,
) -> None:
    check_rewards(config)
    assets = open_model_assets(config)
    tasks = split_tasks(config, split)
    prompts = check_episodes(config, assets, tasks)
    params, at_step = _read_weights(config, assets, checkpoint, step)
    make_run_folder(folder)
    sampling = SamplingParams(config.evaluation.temperature, config.evaluation.top_p)
    with (
        EventLoopThread() as loop,
        TerminalView(len(tasks) * samples, unit="episode") as view,
        ExitStack() as stack,
    ):
        version = at_step // config.training.iterations
        sampler = open_sampler(
            config, assets, WholeWeights(params, assets.config), version, loop, folder, stack
        )
        check = _check_sampler(config, assets, params, version, prompts.first_P, loop, sampler)
        rollout = build_rollout(config, assets, sampler, sampling)
        outcome = evaluate(
            rollout,
            loop,
            tasks,
            split=split,
            samples=samples,
            seed=config.seed,
            name=f"eval-{at_step}",
            progress=view.advance,
        )
    recorder = Recorder(folder, tensorboard=False, wandb_project=None, name=config.name)
    recorder.record(at_step, outcome.metrics | check)
    recorder.close()
    path = folder / "trajectories" / f"eval-{split}-{at_step:06d}.jsonl.gz"
    for fault in records.write(path, outcome.result, f"eval-{split}", at_step):
        print(fault, file=sys.stderr)
    for key, value in outcome.metrics.items():
        print(f"{key:40} {value:.4f}" if isinstance(value, float) else f"{key:40} {value}")
    print(outcome.headline)
    print(f"recorded in {folder}")


if __name__ == "__main__":
    run_program(main)
