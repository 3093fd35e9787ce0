"""What an optimizer step changes in the state, and what it leaves alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.learner.sharding import logical_on_host
from jaxgrpo.types import Trajectory
from tests.updates import (
    GROUPS,
    NO_KL,
    TINY,
    UNTIED,
    clipped_gradient,
    packed,
    params_of,
    update_of,
    worst_error,
)


def test_equal_rewards_without_kl_give_exactly_no_gradient() -> None:
    update = update_of(3, UNTIED, NO_KL)
    equal = [
        dataclasses.replace(g, trajectories=tuple(_with_reward(t, 0.1) for t in g.trajectories))
        for g in GROUPS
    ]
    state, _, report = update.optimizer_step(
        update.init(params_of(UNTIED)), packed(equal, 6), None, [None] * 2
    )
    assert report.grad_norm == 0.0
    gradient = clipped_gradient(update, state)
    chex.assert_trees_all_equal(gradient, jax.tree.map(np.zeros_like, gradient))


def _with_reward(trajectory: Trajectory, reward: float) -> Trajectory:
    return dataclasses.replace(
        trajectory, score=dataclasses.replace(trajectory.score, reward=reward)
    )


def test_a_batch_masked_whole_gives_exactly_no_gradient() -> None:
    update = update_of(1)
    batches = packed([GROUPS[3]] * 4, 4)  # all episodes of this group are overlong
    state = update.init(params_of(TINY))
    _, _, report = update.optimizer_step(
        state, batches, None, update.reference_logprobs(state, batches)
    )
    assert (report.grad_norm, report.sums.loss, report.sums.loss_tokens) == (0.0, 0.0, 0.0)


def test_without_kl_there_is_no_reference() -> None:
    update = update_of(3, UNTIED, NO_KL)
    state = update.init(params_of(UNTIED))
    assert state.reference is None
    assert update.replace_reference(state).reference is None
    assert update.reference_logprobs(state, packed(GROUPS, 6)) == [None, None]


def test_the_reference_is_stored_in_what_is_computed_in() -> None:
    state = update_of(1, dtype=jnp.bfloat16).init(params_of(TINY))
    for ours, whole in zip(
        jax.tree.leaves(state.reference), jax.tree.leaves(state.params), strict=True
    ):
        assert (ours.dtype, whole.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(ours, whole.astype(jnp.bfloat16))


def test_the_reference_stays_while_the_policy_moves_until_it_is_replaced() -> None:
    update, batches = update_of(1), packed(GROUPS, 4)
    params = params_of(TINY)
    state = update.init(params)
    state, _, _ = update.optimizer_step(
        state, batches, None, update.reference_logprobs(state, batches)
    )
    chex.assert_trees_all_equal(logical_on_host(state.reference, update.layout), params)
    state = update.replace_reference(state)
    chex.assert_trees_all_equal(
        logical_on_host(state.reference, update.layout),
        logical_on_host(state.params, update.layout),
    )
    state, _, _ = update.optimizer_step(
        state, batches, None, update.reference_logprobs(state, batches)
    )
    assert (
        worst_error(
            logical_on_host(state.reference, update.layout),
            logical_on_host(state.params, update.layout),
        )
        > 1e-3
    )


def test_the_count_of_steps_grows_by_one() -> None:
    update, batches = update_of(1), packed(GROUPS, 4)
    state = update.init(params_of(TINY))
    assert state.step == 0
    after, _, _ = update.optimizer_step(
        state, batches, None, update.reference_logprobs(state, batches)
    )
    assert after.step == 1
