"""Flat metrics of a batch, against values worked out by hand."""

import dataclasses

import numpy as np
import pytest

from jaxgrpo.config.settings import BatchingSettings
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.learner.losses import LossSums
from jaxgrpo.learner.train_state import StepReport
from jaxgrpo.rollout.rollout import DroppedGroup, RolloutResult
from jaxgrpo.run.batch_metrics import (
    progress_metrics,
    rollout_metrics,
    schedule_metrics,
    update_metrics,
)
from jaxgrpo.types import Group, Score, StopReason, Task, ToolCall, Trajectory
from tests.training import small_config

CALL = ToolCall("ls", "{}", "", ok=True)


def trajectory(
    task: str,
    sampled: list[int],
    reward: float,
    reason=StopReason.FINISHED,
    versions=4,
    calls=0,
    turns=1,
) -> Trajectory:
    mask = np.array(sampled, bool)
    return Trajectory(
        task_id=task,
        sample_index=0,
        prompt_ids_P=np.arange(1, 4, dtype=np.int32),
        completion_ids_C=np.arange(len(sampled), dtype=np.int32),
        action_mask_C=mask,
        sampler_logprobs_C=np.where(mask, -1.0, 0.0).astype(np.float32),
        weight_versions_C=np.where(mask, versions, -1).astype(np.int32),
        messages=(),
        calls=(CALL,) * calls,
        turns=turns,
        stop_reason=reason,
        score=None
        if reason is StopReason.ENVIRONMENT_ERROR
        else Score(reward, reward >= 1, {"tidy": reward / 2}),
    )


GROUPS = (
    Group(
        Task("a"),
        (
            trajectory("a", [1, 1, 0, 1], 1.0, calls=2, turns=2),
            trajectory("a", [1, 1], 0.0, versions=2),
        ),
    ),
    Group(
        Task("b"),
        (
            trajectory("b", [1] * 6, 0.5, StopReason.TOKEN_LIMIT),
            trajectory("b", [1, 1, 1, 0], 0.5, StopReason.GAVE_UP),
        ),
    ),
)
FAILED = trajectory("c", [1], 0.0, StopReason.ENVIRONMENT_ERROR)
RESULT = RolloutResult(GROUPS, (DroppedGroup(Task("c"), "lost"),), (FAILED, FAILED), seconds=2.0)


def test_rollout_metrics_by_hand() -> None:
    metrics = rollout_metrics(RESULT, [], 4)
    expected = {
        "train/reward_mean": 0.5,
        "train/pass_rate": 0.25,
        "train/no_signal_fraction": 0.5,
        "train/groups": 2,
        "train/skipped_batches": 0,
        "train/dropped_groups": 1,
        "train/environment_errors": 2,
        "train/completion_tokens_mean": 4.0,
        "train/completion_tokens_max": 6,
        "train/prompt_tokens_mean": 3.0,
        "train/turns_mean": 1.25,
        "train/tool_calls_mean": 0.5,
        "train/overlong_fraction": 0.25,
        "train/staleness_mean": 4 / 14,  # two of fourteen sampled tokens are two versions old
        "train/staleness_max": 2,
        "time/rollout_seconds": 2.0,
        "speed/sampled_tokens_per_second": 7.0,
        "stop/finished": 0.5,
        "stop/gave_up": 0.25,
        "stop/token_limit": 0.25,
        "stop/environment_error": 0.0,
        "reward/tidy": 0.25,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert all(type(value) in (int, float) for value in metrics.values())


def test_faults_of_skipped_batches_are_counted_with_the_next() -> None:
    lost = RolloutResult(
        (), (DroppedGroup(Task("x"), "e"), DroppedGroup(Task("y"), "e")), (FAILED,) * 3
    )
    metrics = rollout_metrics(RESULT, [lost, lost], 4)
    assert (
        metrics["train/skipped_batches"],
        metrics["train/dropped_groups"],
        metrics["train/environment_errors"],
    ) == (2, 5, 8)


def test_update_metrics_by_hand() -> None:
    batches = make_micro_batches(
        GROUPS, 2, 8, BatchingSettings(prompt_multiple=4, completion_multiple=8)
    )
    first = LossSums(0.5, 10.0, 14.0, 2.0, 0.0, 20.0, 1.4, 0.7, 7.0, 0.3)
    last = first._replace(loss=0.1, clipped=5.0)
    seconds = {"reference": 0.1, "update": 0.5, "probe": 0.05, "publish": 0.2}
    metrics = update_metrics(batches, [StepReport(first, 2.0), StepReport(last, 4.0)], 3, seconds)
    real = 16 + 6  # sixteen completion tokens and two prompts of three
    expected = {
        "train/loss": 0.5,
        "train/kl": 0.2,
        "train/entropy": 2.0,
        "train/clip_fraction": 0.5,  # the last step's
        "train/loss_tokens": 10.0,
        "train/mismatch_mean": 0.1,
        "train/mismatch_max": 0.3,
        "train/mismatch_kl": 0.05,
        "train/mismatch_outside_fraction": 0.5,
        "train/grad_norm": 3.0,
        "train/skipped_steps": 0,
        "train/real_token_fraction": real / (2 * 4 + 4 * 8),
        "train/forwarded_per_completion_token": (2 * 4 + 4 * 8) / 16,
        "train/prompt_sharing": (16 + 4 * 3) / real,
        "train/compilations": 3,
        "time/reference_seconds": 0.1,
        "time/update_seconds": 0.5,
        "time/probe_seconds": 0.05,
        "time/publish_seconds": 0.2,
        "speed/trained_tokens_per_second": real * 2 / 0.5,
    }
    assert metrics == pytest.approx(expected)


def test_a_step_that_was_not_taken_is_counted_and_no_part_of_the_rest() -> None:
    batches = make_micro_batches(
        GROUPS, 2, 8, BatchingSettings(prompt_multiple=4, completion_multiple=8)
    )
    seconds = dict.fromkeys(("reference", "update", "probe", "publish"), 1.0)
    taken = StepReport(LossSums(*[1.0] * 10), 1.0)
    lost = StepReport(LossSums(*[float("nan")] * 10), float("inf"))
    alone = update_metrics(batches, [taken], 1, seconds)
    both = update_metrics(batches, [taken, lost], 1, seconds)
    assert both["train/skipped_steps"] == 1
    shown = [name for name in alone if name.startswith("train/") and name != "train/skipped_steps"]
    assert {name: both[name] for name in shown} == {name: alone[name] for name in shown}


def test_what_a_batch_took_and_who_waited_by_hand() -> None:
    metrics = schedule_metrics(
        {
            "all": 13.0,
            "wait": 4.0,
            "update": 5.0,
            "evaluate": 3.0,
            "record": 0.5,
            "checkpoint": 0.25,
        },
        0.1,
    )
    assert metrics == {
        "time/batch_seconds": 10.0,
        "time/wait_seconds": 4.0,
        "time/record_seconds": 0.5,
        "time/checkpoint_seconds": 0.25,
        "time/trainer_idle_fraction": 0.4,
        "time/sampler_idle_fraction": 0.1,
    }


def test_empty_groups_that_fill_a_micro_batch_count_nothing() -> None:
    one = make_micro_batches(
        GROUPS[:1], 1, 8, BatchingSettings(prompt_multiple=4, completion_multiple=8)
    )
    filled = make_micro_batches(
        GROUPS[:1], 3, 8, BatchingSettings(prompt_multiple=4, completion_multiple=8)
    )
    report = [StepReport(LossSums(*[1.0] * 10), 1.0)]
    seconds = dict.fromkeys(("reference", "update", "probe", "publish"), 1.0)
    a, b = (update_metrics(batches, report, 1, seconds) for batches in (one, filled))
    assert b["train/real_token_fraction"] == pytest.approx(a["train/real_token_fraction"] / 3)
    assert b["train/forwarded_per_completion_token"] == pytest.approx(
        a["train/forwarded_per_completion_token"] * 3
    )
    padded = dict.fromkeys(("train/real_token_fraction", "train/forwarded_per_completion_token"), 0)
    assert a | padded == b | padded


def test_score_parts_that_only_some_episodes_have_count_as_zero() -> None:
    odd = dataclasses.replace(GROUPS[0].trajectories[0], score=Score(1.0, True, {"rare": 1.0}))
    result = RolloutResult(
        (Group(Task("a"), (odd, GROUPS[0].trajectories[1])),), (), (), seconds=1.0
    )
    metrics = rollout_metrics(result, [], 4)
    assert (metrics["reward/rare"], metrics["reward/tidy"]) == (0.5, 0.0)


def test_the_spread_of_rewards_within_groups_and_over_episodes() -> None:
    """Groups of (1, 0) and (0.5, 0.5)."""
    metrics = rollout_metrics(RolloutResult(GROUPS, (), (), 2.0), (), 5)
    assert metrics["train/reward_std"] == pytest.approx(0.5**0.5 / 2)
    quantiles = [metrics[f"train/reward_{name}"] for name in ("min", "q25", "median", "q75", "max")]
    assert quantiles == [0.0, 0.375, 0.5, 0.625, 1.0]


@pytest.mark.parametrize(
    ("warmup", "step", "rate"), [(4, 1, 0.25), (4, 2, 0.5), (4, 4, 1.0), (4, 9, 1.0), (0, 1, 1.0)]
)
def test_the_learning_rate_of_a_step_and_the_epoch(warmup: int, step: int, rate: float) -> None:
    config = small_config("m")  # two tasks per batch: an epoch of seven tasks is three batches
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup)
    metrics = progress_metrics(dataclasses.replace(config, optimizer=optimizer), 7, 4, step)
    assert metrics["train/learning_rate"] == pytest.approx(1e-3 * rate)
    assert metrics["train/epoch"] == pytest.approx(4 / 3)
