"""Let the config's model play some groups before training, and say whether they give a signal."""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console

from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import setup
from jaxgrpo.run.check_report import print_part, print_parts, say, title
from jaxgrpo.run.environment_check import episode_parts, spread
from jaxgrpo.run.pass_rates import pass_rate
from jaxgrpo.run.samplers import open_sampler
from jaxgrpo.run.weights import LogicalWeights
from jaxgrpo.types import Group, Task, Trajectory

GROUPS = 4
"""Groups that are sampled if no number of episodes is given."""


def try_policy(config: Config, episodes: int, console: Console) -> int:
    """Sample whole groups of at least `episodes` episodes (0: four groups) with the embedded
    sampler, print the best and the worst episode of each, and say whether there is signal.

    Return the exit status: 1 if groups were dropped because the environment failed. Raises
    ConfigError for what would end the run before its first batch.
    """
    config = dataclasses.replace(config, sampler="native")
    assets = setup.open_model_assets(config)
    size = config.rollout.group_size
    listed = setup.open_tasks(config, "train")
    tasks = spread(listed, -(-episodes // size) if episodes else GROUPS)
    if not tasks:
        raise ConfigError("the train split of the environment is empty: there is nothing to play")
    setup.check_episodes(config, assets, tasks)
    result = _sampled(config, assets, tasks)
    for group in result.groups:
        _print_group(group, assets, console)
    for dropped in result.dropped:
        say(console, f"\nerror  {dropped.error}", "bold red")
        say(console, f"    the group of task {dropped.task.id!r} is dropped")
    if result.groups:
        _print_verdict(result, console)
    return 1 if result.dropped else 0


def _sampled(config: Config, assets: setup.ModelAssets, tasks: Sequence[Task]) -> RolloutResult:
    params = setup.initial_params(assets, setup.compute_dtype(config))
    weights = LogicalWeights(params, assets.config, 0)
    sampling = SamplingParams(config.rollout.temperature)
    with EventLoopThread() as loop, ExitStack() as stack:
        sampler = open_sampler(config, assets, weights, loop, Path.cwd(), stack)
        rollout = setup.build_rollout(config, assets, sampler, sampling)
        size = config.rollout.group_size
        return loop.call(rollout.groups(tasks, size, config.seed, "check", _progress))


def _progress(done: int, total: int) -> None:
    """Count the episodes in a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} episodes", end="\n" if done == total else "", file=sys.stderr)


def _print_group(group: Group, assets: setup.ModelAssets, console: Console) -> None:
    rewards = " ".join(f"{reward:g}" for reward in group.rewards_G)
    title(console, f"Task {group.task.id!r}")
    first = group.trajectories[0]
    asked = first.messages[: len(first.messages) - _answers(first)]
    print_part(asked[-1].content, console)
    by_reward = sorted(group.trajectories, key=_reward)
    best, worst = by_reward[-1], by_reward[0]
    _print_episode("best", best, assets, console)
    if _reward(worst) < _reward(best):
        _print_episode("worst", worst, assets, console)
    say(console, f"rewards {rewards}", "bold")


def _answers(trajectory: Trajectory) -> int:
    """Return the number of messages after the opening."""
    said = [i for i, message in enumerate(trajectory.messages) if message.role == "assistant"]
    return len(trajectory.messages) - said[len(said) - trajectory.turns]


def _reward(trajectory: Trajectory) -> float:
    assert trajectory.score is not None
    return trajectory.score.reward


def _print_episode(
    which: str, trajectory: Trajectory, assets: setup.ModelAssets, console: Console
) -> None:
    score = trajectory.score
    assert score is not None
    passed = "passed" if score.passed else "not passed"
    tokens = int(trajectory.action_mask_C.sum())
    parts = ", ".join(f"{name} {part:g}" for name, part in score.parts.items())
    told = f"{which}: reward {score.reward:g}, {passed}, {trajectory.stop_reason}, {tokens} tokens"
    say(console, f"{told}{f' ({parts})' if parts else ''}", "bold")
    _, *after = episode_parts(trajectory, assets)
    print_parts(after, console)


def _print_verdict(result: RolloutResult, console: Console) -> None:
    groups = result.groups
    passed_NK = np.array(
        [[t.score is not None and t.score.passed for t in g.trajectories] for g in groups]
    )
    rewards = np.concatenate([group.rewards_G for group in groups])
    spread_groups = sum(bool(np.ptp(group.rewards_G) > 0) for group in groups)
    rate, overlong = pass_rate(passed_NK), sum(t.overlong for g in groups for t in g.trajectories)
    title(console, "Verdict")
    say(
        console,
        f"{len(rewards)} episodes: pass rate {rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}], "
        f"mean reward {rewards.mean():.3f}, {overlong} overlong",
    )
    lines = f"{spread_groups} of {len(groups)} groups have different rewards"
    if spread_groups:
        say(console, f"signal: {lines}: training can begin", "bold green")
        return
    say(console, f"no signal: {lines}, and equal rewards teach nothing", "bold red")
    advice = "harder tasks, because this policy solves all of these"
    if not passed_NK.all():
        advice = (
            "easier tasks, a reward for parts of the way, a larger or warm-started model, or a "
            "larger rollout.group_size; read the episodes above for what goes wrong"
        )
        if overlong > len(rewards) / 2:
            advice = f"a larger rollout.max_completion_tokens (most are overlong); {advice}"
    say(console, f"    try: {advice}")
