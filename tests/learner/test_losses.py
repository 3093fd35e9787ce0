"""The clipped objective, KL and the GRPO loss, against literals and float64 NumPy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config.settings import LossSettings
from jaxgrpo.learner.losses import (
    LossInputs,
    LossSums,
    clipped_objective,
    grpo_loss,
    k3_kl,
    truncated_importance_weight,
)
from tests import reference

LOG2, LOG3 = math.log(2), math.log(3)
PLAIN = LossSettings(clip_low=0.2, clip_high=0.2, kl_beta=0.0)
with_and_without_jit = pytest.mark.parametrize(
    "transform", [jax.jit, lambda function: function], ids=["jit", "no jit"]
)
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


def value_and_gradient(
    inputs: LossInputs, settings: LossSettings, transform: Transform = jax.jit
) -> tuple[jax.Array, jax.Array, LossSums]:
    """Loss, its gradient with respect to the train log-probabilities, and the sums."""

    def loss(train: jax.Array) -> tuple[jax.Array, LossSums]:
        return grpo_loss(dataclasses.replace(inputs, train_logprobs_NGC=train), settings)

    run = transform(jax.value_and_grad(loss, has_aux=True))
    (value, sums), gradient = run(inputs.train_logprobs_NGC)
    return value, gradient, sums


def numpy_loss(inputs: LossInputs, settings: LossSettings) -> tuple[float, np.ndarray]:
    """Loss and gradient in float64 NumPy."""
    return reference.grpo_loss(
        inputs.train_logprobs_NGC,
        inputs.old_logprobs_NGC,
        inputs.reference_logprobs_NGC,
        inputs.sampler_logprobs_NGC,
        inputs.advantages_NG,
        inputs.loss_weights_NGC,
        **{key: x for key, x in dataclasses.asdict(settings).items() if key != "function"},
    )


def golden() -> LossInputs:
    """Two rows of two tokens, one fourth each, with ratios 3/2 and 1/2 and advantages 1 and -1.

    The old policy over the sampler is 3 at every token.
    """
    ratios = np.array([[[1.5, 0.5], [1.5, 0.5]]], np.float32)
    train = np.full((1, 2, 2), -1.0, np.float32)
    old = train - np.log(ratios)
    return LossInputs(
        train_logprobs_NGC=train,
        old_logprobs_NGC=old,
        reference_logprobs_NGC=None,
        sampler_logprobs_NGC=old - np.float32(LOG3),
        entropies_NGC=np.zeros_like(train),
        advantages_NG=np.array([[1.0, -1.0]], np.float32),
        loss_weights_NGC=np.full((1, 2, 2), 0.25, np.float32),
        action_mask_NGC=np.full((1, 2, 2), True),
    )


def golden_with_reference() -> LossInputs:
    """The same, with the reference at train + log 2."""
    reference_NGC = golden().train_logprobs_NGC + np.float32(LOG2)
    return dataclasses.replace(golden(), reference_logprobs_NGC=reference_NGC)


def random_inputs(seed: int, kl: bool = True) -> LossInputs:
    rng = np.random.default_rng(seed)
    shape = (3, 4, 7)
    near = lambda x: (x + rng.normal(0, 0.4, shape)).astype(np.float32)
    train = rng.uniform(-6, -0.01, shape).astype(np.float32)
    weights = np.where(rng.random(shape) < 0.6, rng.random(shape), 0).astype(np.float32)
    weights[1] = 0  # a group masked whole
    advantages = rng.normal(size=shape[:2]).astype(np.float32)
    advantages[2] = 0  # equal rewards
    return LossInputs(
        train_logprobs_NGC=train,
        old_logprobs_NGC=near(train),
        reference_logprobs_NGC=near(train) if kl else None,
        sampler_logprobs_NGC=near(train),
        entropies_NGC=np.zeros_like(train),
        advantages_NG=advantages,
        loss_weights_NGC=weights,
        action_mask_NGC=weights > 0,
    )


SETTINGS = {
    "plain": LossSettings(0.2, 0.2, 0.0),
    "two bounds": LossSettings(0.1, 0.4, 0.0),
    "kl": LossSettings(0.2, 0.28, 0.05),
    "kl and truncated importance": LossSettings(0.2, 0.28, 0.05, tis_cap=1.2),
}


@with_and_without_jit
@pytest.mark.parametrize("name", SETTINGS)
def test_value_and_gradient_equal_float64_numpy(name: str, transform: Transform) -> None:
    settings = SETTINGS[name]
    inputs = random_inputs(0, kl=settings.kl_beta > 0)
    value, gradient, _ = value_and_gradient(inputs, settings, transform)
    expected, expected_gradient = numpy_loss(inputs, settings)
    chex.assert_trees_all_close(float(value), expected, rtol=3e-6)
    chex.assert_trees_all_close(
        np.asarray(gradient), expected_gradient.astype(np.float32), rtol=2e-6, atol=1e-8
    )


def test_the_numpy_gradient_equals_finite_differences() -> None:
    inputs, settings = random_inputs(1), SETTINGS["kl and truncated importance"]
    train = inputs.train_logprobs_NGC.astype(np.float64)

    def value(at: np.ndarray) -> float:
        return numpy_loss(dataclasses.replace(inputs, train_logprobs_NGC=at), settings)[0]

    _, gradient = numpy_loss(dataclasses.replace(inputs, train_logprobs_NGC=train), settings)
    for index in [(0, 0, 0), (0, 1, 3), (0, 2, 6), (1, 0, 0), (2, 1, 1), (2, 3, 5)]:
        step = np.zeros_like(train)
        step[index] = 1e-6
        assert gradient[index] == pytest.approx(
            (value(train + step) - value(train - step)) / 2e-6, abs=1e-9
        )


@with_and_without_jit
def test_the_golden_case_by_hand(transform: Transform) -> None:
    # objectives: min(1.5, 1.2), min(.5, .8), min(-1.5, -1.2), min(-.5, -.8) = 1.2, .5, -1.5, -.8;
    # their sum is -.6, the loss .6 / 4
    value, gradient, _ = value_and_gradient(golden(), PLAIN, transform)
    chex.assert_trees_all_close(value, jnp.float32(0.15), rtol=1e-6)
    # -w A r where the bound does not hold the token back
    chex.assert_trees_all_close(gradient, jnp.array([[[0.0, -0.125], [0.375, 0.0]]]), rtol=1e-6)


def test_clip_high_frees_a_good_token_that_became_likelier() -> None:
    value, gradient, sums = value_and_gradient(golden(), dataclasses.replace(PLAIN, clip_high=0.6))
    chex.assert_trees_all_close(value, jnp.float32(0.075), rtol=1e-6)  # 1.5 + .5 - 1.5 - .8 = -.3
    chex.assert_trees_all_close(gradient, jnp.array([[[-0.375, -0.125], [0.375, 0.0]]]), rtol=1e-6)
    assert float(sums.clipped) == 1


def test_clip_low_frees_a_bad_token_that_became_unlikelier() -> None:
    value, gradient, sums = value_and_gradient(golden(), dataclasses.replace(PLAIN, clip_low=0.6))
    chex.assert_trees_all_close(value, jnp.float32(0.075), rtol=1e-6)  # 1.2 + .5 - 1.5 - .5 = -.3
    chex.assert_trees_all_close(gradient, jnp.array([[[0.0, -0.125], [0.375, 0.125]]]), rtol=1e-6)
    assert float(sums.clipped) == 1


def test_kl_beta_adds_its_share_of_k3() -> None:
    settings = dataclasses.replace(PLAIN, kl_beta=0.1)
    value, gradient, sums = value_and_gradient(golden_with_reference(), settings)
    chex.assert_trees_all_close(value, jnp.float32(0.15 + 0.1 * (2 - LOG2 - 1)), rtol=1e-6)
    chex.assert_trees_all_close(
        gradient, jnp.array([[[-0.025, -0.15], [0.35, -0.025]]]), rtol=1e-5
    )  # + w beta (1 - 2)
    chex.assert_trees_all_close(sums.kl, jnp.float32(4 * (1 - LOG2)), rtol=1e-6)


@pytest.mark.parametrize(("cap", "factor"), [(2.0, 2.0), (5.0, 3.0)])
def test_truncated_importance_scales_the_objective_up_to_its_cap(cap: float, factor: float) -> None:
    plain_value, plain_gradient, _ = value_and_gradient(golden(), PLAIN)
    settings = dataclasses.replace(PLAIN, tis_cap=cap)
    value, gradient, _ = value_and_gradient(golden(), settings)
    chex.assert_trees_all_close(value, factor * plain_value, rtol=1e-6)
    chex.assert_trees_all_close(gradient, factor * plain_gradient, rtol=1e-6)


def test_truncated_importance_leaves_the_kl_alone() -> None:
    inputs = dataclasses.replace(
        golden_with_reference(), advantages_NG=np.zeros((1, 2), np.float32)
    )
    settings = dataclasses.replace(PLAIN, kl_beta=0.1, tis_cap=2.0)
    value, _, _ = value_and_gradient(inputs, settings)
    chex.assert_trees_all_close(value, jnp.float32(0.1 * (1 - LOG2)), rtol=1e-6)


def test_k3_by_hand() -> None:
    kl = k3_kl(jnp.zeros(3), jnp.array([0.0, LOG2, -LOG2]))
    chex.assert_trees_all_close(
        kl, jnp.array([0.0, 1 - LOG2, LOG2 - 0.5]), rtol=1e-6
    )  # 2 - log 2 - 1; 1/2 + log 2 - 1


def test_the_clipped_objective_by_hand() -> None:
    objective = clipped_objective(
        jnp.array([1.5, 0.5, 1.0, 1.5, 0.5]), jnp.array([2.0, 2.0, 2.0, -2.0, -2.0]), 0.2, 0.3
    )
    chex.assert_trees_all_close(objective, jnp.array([2.6, 1.0, 2.0, -3.0, -1.6]), rtol=1e-6)


class TestStaleSamples:
    """A bandit whose policy is softmax(logits), with actions drawn by an older policy.

    Each action is one row, weighted by its probability under the older policy, so that the loss is
    an expectation rather than an estimate.
    """

    LOGITS = np.array([0.5, -1.0, 1.5, 0.0])
    OLDER = np.array([0.05, 0.65, 0.1, 0.2])
    REWARDS = np.array([1.0, 0.0, -1.0, 2.0])

    @property
    def policy(self) -> np.ndarray:
        return np.exp(self.LOGITS) / np.exp(self.LOGITS).sum()

    def policy_gradient(self, drawn: np.ndarray) -> np.ndarray:
        """sum over actions of drawn(a) R(a) grad log policy(a), in float64.

        With drawn = policy, it is the gradient of the expected reward.
        """
        return drawn * self.REWARDS - self.policy * (drawn @ self.REWARDS)

    def gradient(self, tis_cap: float | None) -> np.ndarray:
        """Of minus the loss, at the first step on a batch: the old policy is the policy itself."""
        rows = lambda values: np.asarray(values, np.float32).reshape(1, 4, 1)

        def loss(logits: jax.Array) -> jax.Array:
            train = jax.nn.log_softmax(logits).reshape(1, 4, 1)
            inputs = LossInputs(
                train_logprobs_NGC=train,
                old_logprobs_NGC=jax.lax.stop_gradient(train),
                reference_logprobs_NGC=None,
                sampler_logprobs_NGC=rows(np.log(self.OLDER)),
                entropies_NGC=jnp.zeros_like(train),
                advantages_NG=rows(self.REWARDS)[..., 0],
                loss_weights_NGC=rows(self.OLDER),
                action_mask_NGC=rows(np.ones(4)) > 0,
            )
            return -grpo_loss(inputs, dataclasses.replace(PLAIN, tis_cap=tis_cap))[0]

        return np.asarray(jax.grad(loss)(jnp.asarray(self.LOGITS, jnp.float32)))

    def test_with_the_importance_weight_the_gradient_is_the_on_policy_one(self) -> None:
        np.testing.assert_allclose(
            self.gradient(math.inf), self.policy_gradient(self.policy), rtol=1e-6
        )

    def test_without_it_it_is_another(self) -> None:
        np.testing.assert_allclose(self.gradient(None), self.policy_gradient(self.OLDER), rtol=1e-6)
        on_policy, biased = self.policy_gradient(self.policy), self.gradient(None)
        assert (
            on_policy[0] > 0.2 and biased[0] < -0.02
        )  # a good action that the older policy hardly took would become rarer

    def test_a_cap_bounds_the_weight_and_leaves_the_rest_as_it_is(self) -> None:
        """policy / older is about 4.4, 0.08, 6 and 0.7, so a cap of 2 holds for two actions."""
        drawn = np.minimum(self.policy, 2.0 * self.OLDER)
        assert (drawn < self.policy).tolist() == [True, False, True, False]
        np.testing.assert_allclose(self.gradient(2.0), self.policy_gradient(drawn), rtol=1e-6)


def test_no_gradient_flows_through_the_importance_weight() -> None:
    gradient = jax.grad(lambda x: truncated_importance_weight(x, jnp.float32(-1.0), 2.0))(
        jnp.float32(-1.2)
    )
    assert float(gradient) == 0.0


@with_and_without_jit
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_tokens_of_zero_weight_contribute_nothing_whatever_they_hold(
    garbage: float, transform: Transform
) -> None:
    inputs, settings = random_inputs(2), SETTINGS["kl and truncated importance"]
    advantages = inputs.advantages_NG.copy()
    advantages[1] = garbage  # the group that is masked whole
    names = ("train", "old", "reference", "sampler")
    arrays = {f"{name}_logprobs_NGC": getattr(inputs, f"{name}_logprobs_NGC") for name in names}
    has_loss = inputs.loss_weights_NGC > 0
    spoiled = dataclasses.replace(
        inputs,
        advantages_NG=advantages,
        **{name: np.where(has_loss, x, np.float32(garbage)) for name, x in arrays.items()},
    )
    clean_value, clean_gradient, clean_sums = value_and_gradient(inputs, settings, transform)
    value, gradient, sums = value_and_gradient(spoiled, settings, transform)
    chex.assert_trees_all_equal((value, gradient, sums), (clean_value, clean_gradient, clean_sums))


@with_and_without_jit
def test_a_batch_without_any_loss_token_has_zero_loss_and_gradient(transform: Transform) -> None:
    inputs = dataclasses.replace(
        random_inputs(3),
        loss_weights_NGC=np.zeros((3, 4, 7), np.float32),
        action_mask_NGC=np.zeros((3, 4, 7), bool),
    )
    value, gradient, sums = value_and_gradient(inputs, SETTINGS["kl"], transform)
    chex.assert_trees_all_equal((value, gradient), (jnp.float32(0), jnp.zeros((3, 4, 7))))
    assert all(np.isfinite(x) for x in sums.summary().values())


def test_a_group_masked_whole_gets_no_gradient() -> None:
    _, gradient, _ = value_and_gradient(random_inputs(4), SETTINGS["kl"])
    chex.assert_trees_all_equal(gradient[1], jnp.zeros((4, 7)))


def test_equal_rewards_without_kl_give_exactly_zero_gradient() -> None:
    _, gradient, _ = value_and_gradient(random_inputs(5, kl=False), PLAIN)
    chex.assert_trees_all_equal(gradient[2], jnp.zeros((4, 7)))


def test_on_policy_the_gradient_is_minus_weight_times_advantage() -> None:
    inputs = random_inputs(6, kl=False)
    inputs = dataclasses.replace(inputs, old_logprobs_NGC=inputs.train_logprobs_NGC)
    _, gradient, _ = value_and_gradient(inputs, PLAIN)
    expected = -inputs.loss_weights_NGC * inputs.advantages_NG[:, :, None]
    chex.assert_trees_all_close(gradient, jnp.asarray(expected), rtol=1e-6)


def test_the_sums_by_hand() -> None:
    """One row of five sampled tokens, the last two without loss, and one of the environment.

    On the sampled tokens, policy over sampler is 1, 2, 1/4, 1.12 and .88. On those with loss, the
    ratio (policy over old policy) is 1, 3/2 and 1/2, and reference over policy 1, 2 and 1.
    """
    row = lambda *values: np.array([[values]], np.float32)
    train = np.full((1, 1, 6), -1.0, np.float32)
    inputs = LossInputs(
        train_logprobs_NGC=train,
        old_logprobs_NGC=train - np.log(row(1, 1.5, 0.5, 9, 9, 9)),
        reference_logprobs_NGC=train + np.log(row(1, 2, 1, 9, 9, 9)),
        sampler_logprobs_NGC=train - np.log(row(1, 2, 0.25, 1.12, 0.88, 7)),
        entropies_NGC=row(1, 2, 6, 64, 128, 256),
        advantages_NG=np.ones((1, 1), np.float32),
        loss_weights_NGC=row(0.5, 0.5, 0.5, 0, 0, 0),
        action_mask_NGC=row(1, 1, 1, 1, 1, 0) > 0,
    )
    _, sums = grpo_loss(inputs, dataclasses.replace(PLAIN, kl_beta=0.1))
    expected = {
        "loss": 0.5 * (-1 - 1.2 - 0.5 + 0.1 * (1 - LOG2)),
        "kl": (2 - LOG2 - 1) / 3,
        "clip_fraction": 1 / 3,
        "entropy": 3.0,
        "loss_tokens": 3.0,
        "mismatch_mean": (3 * LOG2 + math.log(1.12) - math.log(0.88)) / 5,
        "mismatch_max": 2 * LOG2,  # of a token that became rarer
        # r - log r - 1 for r of 2, 1/4, 1.12 and .88
        "mismatch_kl": (1 - LOG2 + 2 * LOG2 - 0.75 + 0.12 - math.log(1.12) - 0.12 - math.log(0.88))
        / 5,
        "mismatch_outside_fraction": 4 / 5,
    }
    assert sums.summary() == pytest.approx(expected, rel=1e-6)


def test_a_ratio_within_a_tenth_of_the_samplers_is_not_outside() -> None:
    """1.09 and .91 are not, 1.11 and .89 are."""
    sampler = -np.log(np.array([[[1.09, 0.91, 1.11, 0.89]]], np.float32))
    zeros = np.zeros((1, 1, 4), np.float32)
    one = np.ones((1, 1), np.float32)
    inputs = LossInputs(zeros, zeros, None, sampler, zeros, one, zeros + 1, zeros == 0)
    _, sums = grpo_loss(inputs, PLAIN)
    assert float(sums.mismatch_outside) == 2


def test_sums_add_up_and_the_largest_mismatch_stays_the_largest() -> None:
    first, second = LossSums(*map(float, range(10))), LossSums(*map(float, range(10, 20)))
    assert first.add(second) == LossSums(10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 19.0)
    assert second.add(first).mismatch_max == 19.0


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    "name",
    [field.name for field in dataclasses.fields(LossInputs) if field.name != "train_logprobs_NGC"],
)
def test_the_loss_refuses_arrays_of_different_shapes(name: str) -> None:
    """Each array of one group instead of two would be broadcast without an error."""
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), golden_with_reference())
    value_and_gradient(twice, PLAIN)
    wrong = dataclasses.replace(twice, **{name: getattr(twice, name)[:1]})
    with pytest.raises(AssertionError, match="shape"):
        value_and_gradient(wrong, PLAIN)
