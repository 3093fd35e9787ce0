"""The sharded train step: the same on any number of devices and any split, equal to a plain one.

The plain one repeats the prompt for every row, builds its rows from the trajectories themselves,
takes a dense log-softmax, and steps with AdamW in float64 NumPy.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config.settings import BatchingSettings, LossSettings
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.learner.sharding import logical_on_host
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, cast_to, forward, head_table
from jaxgrpo.types import Group, MicroBatch, Trajectory
from tests import reference
from tests.updates import (
    ADAM,
    GROUPS,
    LONGEST,
    LOSS,
    NO_KL,
    TEMPERATURE,
    TINY,
    UNTIED,
    assert_same_run,
    change_error,
    changed,
    clipped_gradient,
    packed,
    params_of,
    run_of,
    two_steps,
    update_of,
    worst_error,
)

# One batch however it is spread.


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_several_devices_take_the_steps_of_one(devices: int) -> None:
    assert_same_run(run_of(devices), run_of(1))


def test_a_batch_split_into_micro_batches_takes_the_steps_of_the_whole() -> None:
    assert_same_run(run_of(1, micro_batch_groups=4), run_of(1))


def test_the_order_of_groups_and_micro_batches_does_not_matter() -> None:
    shuffled = [GROUPS[i] for i in np.random.default_rng(1).permutation(len(GROUPS))]
    assert_same_run(two_steps(update_of(1), packed(shuffled, 4)[::-1], params_of(TINY)), run_of(1))


def test_padding_with_empty_groups_does_not_matter() -> None:
    groups = GROUPS[:5]  # two micro-batches of four, three groups of them empty
    run = two_steps(update_of(1), packed(groups, 4), params_of(TINY))
    assert_same_run(two_steps(update_of(1), packed(groups, 12), params_of(TINY)), run)


def test_what_padding_holds_does_not_matter() -> None:
    rng = np.random.default_rng(2)

    def spoil(batch: MicroBatch) -> MicroBatch:
        p, c = batch.prompt_NP.shape[1], batch.completions_NGC.shape[2]
        prompt_padding = np.arange(p) >= batch.prompt_lengths_N[:, None]
        padding = np.arange(c) >= batch.completion_lengths_NG[:, :, None]
        garbage = rng.integers(0, TINY.vocab_size, batch.completions_NGC.shape)
        return dataclasses.replace(
            batch,
            prompt_NP=np.where(
                prompt_padding,
                rng.integers(0, TINY.vocab_size, prompt_padding.shape),
                batch.prompt_NP,
            ).astype(np.int32),
            completions_NGC=np.where(padding, garbage, batch.completions_NGC).astype(np.int32),
            sampler_logprobs_NGC=np.where(padding, np.float32(np.nan), batch.sampler_logprobs_NGC),
        )

    batches = packed(GROUPS, 4)
    assert_same_run(
        two_steps(update_of(1), [spoil(b) for b in batches], params_of(TINY)),
        run_of(1, micro_batch_groups=4),
    )


# One batch by a plain implementation.


@dataclasses.dataclass(frozen=True)
class Rows:
    """Each trajectory as one row of prompt + completion.

    `targets` are positions in the row, or -1 where a row has no such token.
    """

    ids_RT: np.ndarray
    targets_RC: np.ndarray
    weights_RC: np.ndarray
    advantages_R: np.ndarray
    sampler_RC: np.ndarray


def plain_rows(groups: Sequence[Group]) -> Rows:
    trajectories = [t for group in groups for t in group.trajectories]
    ids, targets = (
        np.zeros((len(trajectories), 2 * LONGEST), int),
        np.full((len(trajectories), LONGEST), -1),
    )
    weights, sampler = (
        np.zeros((len(trajectories), LONGEST)),
        np.zeros((len(trajectories), LONGEST)),
    )
    for r, t in enumerate(trajectories):
        start, length = len(t.prompt_ids_P), len(t.completion_ids_C)
        ids[r, : start + length] = [*t.prompt_ids_P, *t.completion_ids_C]
        targets[r, :length] = np.arange(start, start + length)
        weights[r, :length] = t.action_mask_C & (not t.overlong)
        sampler[r, :length] = t.sampler_logprobs_C
    rewards = np.array([group.rewards_G for group in groups])
    spread = rewards - rewards.mean(axis=1, keepdims=True)
    advantages = spread / (
        np.sqrt(np.sum(spread**2, axis=1, keepdims=True) / (rewards.shape[1] - 1)) + 1e-4
    )
    return Rows(ids, targets, weights / weights.sum(), advantages.reshape(-1), sampler)


@functools.partial(jax.jit, static_argnums=0)
def plain_logprobs(
    config: ModelConfig, params: Params, ids_RT: jax.Array, targets_RC: jax.Array
) -> jax.Array:
    """The log-probability of each target token [R, C], from the position before it."""
    hidden = forward(config, params, ids_RT, load=cast_to(jnp.float32))
    dense = jax.nn.log_softmax(hidden @ head_table(params).T / TEMPERATURE)
    rows = jnp.arange(len(ids_RT))[:, None]
    return jnp.where(targets_RC >= 0, dense[rows, targets_RC - 1, ids_RT[rows, targets_RC]], 0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def plain_gradient(
    config: ModelConfig,
    loss: LossSettings,
    params: Params,
    rows: dict[str, Any],
    old: jax.Array,
    anchor: jax.Array,
) -> tuple[jax.Array, Params]:
    def objective(p: Params) -> jax.Array:
        train = plain_logprobs(config, p, rows["ids_RT"], rows["targets_RC"])
        advantage, ratio = rows["advantages_R"][:, None], jnp.exp(train - old)
        held = jnp.where(
            advantage > 0,
            jnp.minimum(ratio, 1 + loss.clip_high),
            jnp.maximum(ratio, 1 - loss.clip_low),
        )
        gain = held * advantage
        if loss.tis_cap is not None:
            gain = gain * jnp.minimum(jnp.exp(old - rows["sampler_RC"]), loss.tis_cap)
        kl = jnp.exp(anchor - train) - (anchor - train) - 1
        return jnp.sum(rows["weights_RC"] * (loss.kl_beta * kl - gain))

    return jax.value_and_grad(objective)(params)


def plain_start(
    config: ModelConfig, loss: LossSettings, groups: Sequence[Group]
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """The groups' rows, and their log-probabilities under the first policy and the reference."""
    rows, params = dataclasses.asdict(plain_rows(groups)), params_of(config)
    score = functools.partial(
        plain_logprobs, config, ids_RT=rows["ids_RT"], targets_RC=rows["targets_RC"]
    )
    anchor = (
        score(jax.tree.map(lambda x: x * np.float32(0.97), params))
        if loss.kl_beta
        else score(params)
    )
    return rows, score(params), anchor


@functools.cache
def plain_run(
    config: ModelConfig, loss: LossSettings
) -> tuple[list[float], list[float], list[Params], Params]:
    """Two plain steps: losses, gradient norms, changes of weights, the first unclipped gradient."""
    (rows, old, anchor), params = plain_start(config, loss, GROUPS), params_of(config)
    flat, tree = jax.tree.flatten(params)
    moments: list[tuple[Any, Any]] = [(0.0, 0.0)] * len(flat)
    losses, norms, changes, gradients = [], [], [], []
    for step in (1, 2):
        value, gradient = plain_gradient(
            config, loss, jax.tree.unflatten(tree, flat), rows, old, anchor
        )
        settings = dataclasses.asdict(ADAM)
        del settings["warmup_steps"]
        new, moments, norm = reference.adamw(
            flat, [np.asarray(g) for g in jax.tree.leaves(gradient)], moments, step, **settings
        )
        new = [x.astype(np.float32) for x in new]
        changes.append(changed(jax.tree.unflatten(tree, flat), jax.tree.unflatten(tree, new)))
        losses.append(float(value))
        norms.append(norm)
        gradients.append(gradient)
        flat = new
    return losses, norms, changes, jax.tree.map(np.asarray, gradients[0])


def test_the_gradient_of_shared_prompts_equals_that_of_repeated_prompts() -> None:
    _, norms, _, gradient = plain_run(TINY, LOSS)
    expected = jax.tree.map(lambda g: g * min(1.0, ADAM.max_grad_norm / norms[0]), gradient)
    assert worst_error(run_of(1).gradient, expected) < 1e-5


def test_the_gradient_is_that_of_the_right_groups_when_packing_reorders() -> None:
    """Groups of several padded shapes are packed in another order than they were sampled in.

    Each token has a log-probability of its own under the sampler, so that a mix-up of groups or
    rows shows in the gradient or in the mismatch.
    """
    rng = np.random.default_rng(6)
    groups = [
        dataclasses.replace(
            g, trajectories=tuple(_with_own_logprobs(t, rng) for t in g.trajectories)
        )
        for g in GROUPS
    ]
    batches = make_micro_batches(
        groups, 4, LONGEST, BatchingSettings(prompt_multiple=4, completion_multiple=4)
    )
    assert [b.prompt_NP.shape[1] for b in batches] == [4, 4, 8]
    lengths = np.concatenate([b.prompt_lengths_N for b in batches]).tolist()
    assert sorted(lengths[:8]) == [1, 1, 2, 2, 3, 3, 4, 4] and lengths != [
        len(g.prompt_ids_P) for g in groups
    ]
    rows, train, anchor = plain_start(TINY, LOSS, groups)
    value, gradient = plain_gradient(TINY, LOSS, params_of(TINY), rows, train, anchor)
    run = two_steps(update_of(1), batches, params_of(TINY))
    norm = float(
        np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    )
    expected = jax.tree.map(lambda g: np.asarray(g) * min(1.0, ADAM.max_grad_norm / norm), gradient)
    assert worst_error(run.gradient, expected) < 1e-5
    sampled = rows["sampler_RC"] != 0
    apart = np.where(sampled, np.asarray(train) - rows["sampler_RC"], 0.0)
    sums = run.reports[0].sums
    assert (sums.loss, sums.loss_tokens, sums.sampled_tokens) == pytest.approx(
        (float(value), (rows["weights_RC"] > 0).sum(), sampled.sum()), rel=3e-6
    )
    assert (sums.mismatch, sums.mismatch_max) == pytest.approx(
        (np.abs(apart).sum(), np.abs(apart).max()), rel=2e-6
    )


def _with_own_logprobs(trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
    drawn = np.where(
        trajectory.action_mask_C, rng.uniform(-7, -2, len(trajectory.action_mask_C)), 0
    )
    return dataclasses.replace(trajectory, sampler_logprobs_C=drawn.astype(np.float32))


def test_two_steps_equal_plain_ones() -> None:
    losses, norms, changes, _ = plain_run(TINY, LOSS)
    run = run_of(1)
    assert [r.sums.loss for r in run.reports] == pytest.approx(losses, rel=3e-6)
    assert [r.grad_norm for r in run.reports] == pytest.approx(norms, rel=2e-6)
    assert change_error(run.first_change, changes[0]) < 1e-5
    assert change_error(run.second_change, changes[1]) < 1e-5


def test_two_steps_of_an_untied_model_without_kl_equal_plain_ones() -> None:
    losses, norms, changes, _ = plain_run(UNTIED, NO_KL)
    run = two_steps(update_of(3, UNTIED, NO_KL), packed(GROUPS, 6), params_of(UNTIED))
    assert [r.sums.loss for r in run.reports] == pytest.approx(losses, rel=3e-6)
    assert [r.grad_norm for r in run.reports] == pytest.approx(norms, rel=2e-6)
    assert change_error(run.first_change, changes[0]) < 1e-5
    assert change_error(run.second_change, changes[1]) < 1e-5


def test_the_second_step_clips_tokens() -> None:
    """So that the comparisons above are of a step off policy."""
    first, second = run_of(1).reports
    assert first.sums.clipped == 0
    assert second.sums.clipped > 0


def test_the_loss_of_a_fixed_seed_is_what_it_was() -> None:
    first, second = run_of(1).reports
    assert (first.sums.loss, second.sums.loss) == pytest.approx((0.01130828, -0.04880323), rel=1e-5)
    assert (first.grad_norm, second.grad_norm) == pytest.approx((0.1447684, 0.1093829), rel=1e-5)


# Log-probabilities.


def test_logprobs_equal_a_dense_log_softmax_of_repeated_prompts() -> None:
    update, rows = update_of(1), plain_rows(GROUPS)
    (batch,) = packed(GROUPS, 12)
    params = params_of(TINY)
    ours = np.asarray(update.logprobs(update.init(params).params, batch))
    expected = np.asarray(plain_logprobs(TINY, params, rows.ids_RT, rows.targets_RC)).reshape(
        12, 3, LONGEST
    )
    order = [next(n for n, g in enumerate(GROUPS) if _is_row(batch, i, g)) for i in range(12)]
    real = np.arange(LONGEST) < batch.completion_lengths_NG[:, :, None]
    chex.assert_trees_all_close(
        np.where(real, ours, 0), np.where(real, expected[order], 0), atol=3e-6
    )


def _is_row(batch: MicroBatch, i: int, group: Group) -> bool:
    first = group.trajectories[0].completion_ids_C
    same_prompt = np.array_equal(
        batch.prompt_NP[i, : batch.prompt_lengths_N[i]], group.prompt_ids_P
    )
    return same_prompt and np.array_equal(
        batch.completions_NGC[i, 0, : batch.completion_lengths_NG[i, 0]], first
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_the_policy_in_training_is_the_one_whose_weights_are_served(devices: int) -> None:
    """The forward pass rounds its weights; the gradient goes to the exact master weights."""
    params, batches = params_of(TINY), packed(GROUPS, 12)
    served = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.bfloat16), np.float32), params)
    rounding, plain = update_of(devices, served_dtype=jnp.bfloat16), update_of(devices)
    states = [rounding.init(params), plain.init(served)]
    anchors = [
        update.reference_logprobs(state, batches)
        for update, state in zip((rounding, plain), states, strict=True)
    ]
    for ours, theirs in zip(*anchors, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    stepped = [
        update.optimizer_step(state, batches, None, anchor)
        for update, state, anchor in zip((rounding, plain), states, anchors, strict=True)
    ]
    gradients = [clipped_gradient(plain, state) for state, _, _ in stepped]
    assert worst_error(*gradients) < 1e-6
    moved = [
        changed(start, logical_on_host(state.params, plain.layout))
        for start, (state, _, _) in zip((params, served), stepped, strict=True)
    ]
    assert change_error(*moved) < 1e-4  # less the weight decay of a rounding


def test_the_first_steps_logprobs_are_those_of_the_weights_before_it() -> None:
    update, batches = update_of(1), packed(GROUPS, 4)
    state = update.init(params_of(TINY))
    anchors = update.reference_logprobs(state, batches)
    _, train, _ = update.optimizer_step(state, batches, None, anchors)
    chex.assert_trees_all_close(
        [figures.logprobs_NGC for figures in train], anchors, atol=1e-6
    )  # the reference is the first policy


def test_the_first_step_equals_one_with_its_own_logprobs_as_the_old_ones() -> None:
    update, batches = update_of(1), packed(GROUPS, 4)
    state = update.init(params_of(TINY))
    anchors = update.reference_logprobs(state, batches)
    implicit, train, first = update.optimizer_step(state, batches, None, anchors)
    explicit, _, second = update.optimizer_step(
        update.init(params_of(TINY)), batches, train, anchors
    )
    chex.assert_trees_all_close(
        logical_on_host(implicit.params, update.layout),
        logical_on_host(explicit.params, update.layout),
        atol=1e-7,
    )
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-6)


# What a step reports.


def test_the_reported_norm_is_that_before_clipping() -> None:
    _, norms, _, gradient = plain_run(TINY, LOSS)
    whole = float(
        np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    )
    assert norms[0] == pytest.approx(whole, rel=1e-12) and whole > ADAM.max_grad_norm
    assert run_of(1).reports[0].grad_norm == pytest.approx(whole, rel=1e-6)
