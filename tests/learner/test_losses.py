"""The clipped objective, KL and the GRPO loss: values and gradients, against literals and float64 NumPy."""

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


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of the loss."""

    train: np.ndarray
    old: np.ndarray
    reference: np.ndarray | None
    sampler: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray

    def run(
        self, settings: LossSettings, transform: Transform = jax.jit
    ) -> tuple[jax.Array, jax.Array, LossSums]:
        """Loss, its gradient with respect to the train log-probabilities, and the sums."""
        rest = (
            self.old,
            self.reference,
            self.sampler,
            np.zeros_like(self.train),
            self.advantages,
            self.weights,
            self.weights > 0,
        )

        def loss(train: jax.Array) -> tuple[jax.Array, LossSums]:
            return grpo_loss(train, *rest, settings)

        (value, sums), gradient = transform(jax.value_and_grad(loss, has_aux=True))(self.train)
        return value, gradient, sums


def golden() -> Case:
    """Two rows of two tokens with ratios 3/2 and 1/2, advantages 1 and -1, one fourth each; the reference at train + log 2."""
    ratios = np.array([[[1.5, 0.5], [1.5, 0.5]]], np.float32)
    train = np.full((1, 2, 2), -1.0, np.float32)
    old = train - np.log(ratios)
    advantages = np.array([[1.0, -1.0]], np.float32)
    return Case(
        train, old, None, old - np.float32(LOG3), advantages, np.full((1, 2, 2), 0.25, np.float32)
    )


def random_case(seed: int, kl: bool = True) -> Case:
    rng = np.random.default_rng(seed)
    shape = (3, 4, 7)
    near = lambda x: (x + rng.normal(0, 0.4, shape)).astype(np.float32)
    train = rng.uniform(-6, -0.01, shape).astype(np.float32)
    weights = np.where(rng.random(shape) < 0.6, rng.random(shape), 0).astype(np.float32)
    weights[1] = 0  # a group masked whole
    advantages = rng.normal(size=shape[:2]).astype(np.float32)
    advantages[2] = 0  # equal rewards
    return Case(train, near(train), near(train) if kl else None, near(train), advantages, weights)


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
    case = random_case(0, kl=settings.kl_beta > 0)
    value, gradient, _ = case.run(settings, transform)
    expected, expected_gradient = reference.grpo_loss(
        **dataclasses.asdict(case), **dataclasses.asdict(settings)
    )
    chex.assert_trees_all_close(float(value), expected, rtol=3e-6)
    chex.assert_trees_all_close(
        np.asarray(gradient), expected_gradient.astype(np.float32), rtol=2e-6, atol=1e-8
    )


def test_the_numpy_gradient_equals_finite_differences() -> None:
    case, settings = random_case(1), SETTINGS["kl and truncated importance"]
    train = case.train.astype(np.float64)

    def value(at: np.ndarray) -> float:
        return reference.grpo_loss(
            **(dataclasses.asdict(case) | {"train": at}), **dataclasses.asdict(settings)
        )[0]

    _, gradient = reference.grpo_loss(
        **(dataclasses.asdict(case) | {"train": train}), **dataclasses.asdict(settings)
    )
    for index in [(0, 0, 0), (0, 1, 3), (0, 2, 6), (1, 0, 0), (2, 1, 1), (2, 3, 5)]:
        step = np.zeros_like(train)
        step[index] = 1e-6
        assert gradient[index] == pytest.approx(
            (value(train + step) - value(train - step)) / 2e-6, abs=1e-9
        )


@with_and_without_jit
def test_the_golden_case_by_hand(transform: Transform) -> None:
    # objectives: min(1.5, 1.2), min(.5, .8), min(-1.5, -1.2), min(-.5, -.8) = 1.2, .5, -1.5, -.8; their sum -.6; loss .6 / 4
    value, gradient, _ = golden().run(PLAIN, transform)
    chex.assert_trees_all_close(value, jnp.float32(0.15), rtol=1e-6)
    # -w A r where the bound does not hold the token back
    chex.assert_trees_all_close(gradient, jnp.array([[[0.0, -0.125], [0.375, 0.0]]]), rtol=1e-6)


def test_clip_high_frees_a_good_token_that_became_likelier() -> None:
    value, gradient, sums = golden().run(dataclasses.replace(PLAIN, clip_high=0.6))
    chex.assert_trees_all_close(value, jnp.float32(0.075), rtol=1e-6)  # 1.5 + .5 - 1.5 - .8 = -.3
    chex.assert_trees_all_close(gradient, jnp.array([[[-0.375, -0.125], [0.375, 0.0]]]), rtol=1e-6)
    assert float(sums.clipped) == 1


def test_clip_low_frees_a_bad_token_that_became_unlikelier() -> None:
    value, gradient, sums = golden().run(dataclasses.replace(PLAIN, clip_low=0.6))
    chex.assert_trees_all_close(value, jnp.float32(0.075), rtol=1e-6)  # 1.2 + .5 - 1.5 - .5 = -.3
    chex.assert_trees_all_close(gradient, jnp.array([[[0.0, -0.125], [0.375, 0.125]]]), rtol=1e-6)
    assert float(sums.clipped) == 1


def test_kl_beta_adds_its_share_of_k3() -> None:
    case = dataclasses.replace(golden(), reference=golden().train + np.float32(LOG2))
    value, gradient, sums = case.run(dataclasses.replace(PLAIN, kl_beta=0.1))
    chex.assert_trees_all_close(value, jnp.float32(0.15 + 0.1 * (2 - LOG2 - 1)), rtol=1e-6)
    chex.assert_trees_all_close(
        gradient, jnp.array([[[-0.025, -0.15], [0.35, -0.025]]]), rtol=1e-5
    )  # + w beta (1 - 2)
    chex.assert_trees_all_close(sums.kl, jnp.float32(4 * (1 - LOG2)), rtol=1e-6)


@pytest.mark.parametrize(("cap", "factor"), [(2.0, 2.0), (5.0, 3.0)])
def test_truncated_importance_scales_the_objective_up_to_its_cap(cap: float, factor: float) -> None:
    plain_value, plain_gradient, _ = golden().run(PLAIN)
    value, gradient, _ = golden().run(
        dataclasses.replace(PLAIN, tis_cap=cap)
    )  # old over sampler is 3 at every token
    chex.assert_trees_all_close(value, factor * plain_value, rtol=1e-6)
    chex.assert_trees_all_close(gradient, factor * plain_gradient, rtol=1e-6)


def test_truncated_importance_leaves_the_kl_alone() -> None:
    case = dataclasses.replace(
        golden(),
        reference=golden().train + np.float32(LOG2),
        advantages=np.zeros((1, 2), np.float32),
    )
    value, _, _ = case.run(dataclasses.replace(PLAIN, kl_beta=0.1, tis_cap=2.0))
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
    """A bandit whose policy is softmax(logits), its actions drawn by an older policy. Every action is one row, weighted with its
    probability under the older policy, so that the loss is an expectation, not an estimate."""

    LOGITS = np.array([0.5, -1.0, 1.5, 0.0])
    OLDER = np.array([0.05, 0.65, 0.1, 0.2])
    REWARDS = np.array([1.0, 0.0, -1.0, 2.0])

    @property
    def policy(self) -> np.ndarray:
        return np.exp(self.LOGITS) / np.exp(self.LOGITS).sum()

    def policy_gradient(self, drawn: np.ndarray) -> np.ndarray:
        """sum over actions of drawn(a) R(a) grad log policy(a), in float64: with drawn = policy the gradient of the expected reward."""
        return drawn * self.REWARDS - self.policy * (drawn @ self.REWARDS)

    def gradient(self, tis_cap: float | None) -> np.ndarray:
        """Of minus the loss, at the first step on a batch: the old policy is the policy itself."""
        rows = lambda values: np.asarray(values, np.float32).reshape(1, 4, 1)

        def loss(logits: jax.Array) -> jax.Array:
            train = jax.nn.log_softmax(logits).reshape(1, 4, 1)
            fixed = (
                jax.lax.stop_gradient(train),
                None,
                rows(np.log(self.OLDER)),
                jnp.zeros_like(train),
            )
            settings = dataclasses.replace(PLAIN, tis_cap=tis_cap)
            return -grpo_loss(
                train,
                *fixed,
                rows(self.REWARDS)[..., 0],
                rows(self.OLDER),
                rows(np.ones(4)) > 0,
                settings,
            )[0]

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
        """policy / older is about 4.4, 0.08, 6 and 0.7: a cap of 2 counts the first and the third action twice, where they lack more."""
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
    case, settings = random_case(2), SETTINGS["kl and truncated importance"]
    spoil = lambda x: np.where(case.weights > 0, x, np.float32(garbage))
    advantages = case.advantages.copy()
    advantages[1] = garbage  # the group that is masked whole
    names = ("train", "old", "reference", "sampler")
    spoiled = dataclasses.replace(
        case, advantages=advantages, **{name: spoil(getattr(case, name)) for name in names}
    )
    clean_value, clean_gradient, clean_sums = case.run(settings, transform)
    value, gradient, sums = spoiled.run(settings, transform)
    chex.assert_trees_all_equal((value, gradient, sums), (clean_value, clean_gradient, clean_sums))


@with_and_without_jit
def test_a_batch_without_any_loss_token_has_zero_loss_and_gradient(transform: Transform) -> None:
    case = dataclasses.replace(random_case(3), weights=np.zeros((3, 4, 7), np.float32))
    value, gradient, sums = case.run(SETTINGS["kl"], transform)
    chex.assert_trees_all_equal((value, gradient), (jnp.float32(0), jnp.zeros((3, 4, 7))))
    assert all(np.isfinite(x) for x in sums.summary().values())


def test_a_group_masked_whole_gets_no_gradient() -> None:
    _, gradient, _ = random_case(4).run(SETTINGS["kl"])
    chex.assert_trees_all_equal(gradient[1], jnp.zeros((4, 7)))


def test_equal_rewards_without_kl_give_exactly_zero_gradient() -> None:
    _, gradient, _ = random_case(5, kl=False).run(PLAIN)
    chex.assert_trees_all_equal(gradient[2], jnp.zeros((4, 7)))


def test_on_policy_the_gradient_is_minus_weight_times_advantage() -> None:
    case = random_case(6, kl=False)
    _, gradient, _ = dataclasses.replace(case, old=case.train).run(PLAIN)
    chex.assert_trees_all_close(
        gradient, jnp.asarray(-case.weights * case.advantages[:, :, None]), rtol=1e-6
    )


def test_the_sums_by_hand() -> None:
    """One row of five sampled tokens, the last two without loss, and one of the environment's. Policy over sampler is 1, 2, 1/4, 1.12 and
    .88 there; the ratio, policy over old policy, is 1, 3/2 and 1/2, and the reference is the policy times 1, 2 and 1."""
    row = lambda *values: np.array([[values]], np.float32)
    train = np.full((1, 1, 6), -1.0, np.float32)
    sampler = train - np.log(row(1, 2, 0.25, 1.12, 0.88, 7))
    old, reference_ = (
        train - np.log(row(1, 1.5, 0.5, 9, 9, 9)),
        train + np.log(row(1, 2, 1, 9, 9, 9)),
    )
    entropies, weights = row(1, 2, 6, 64, 128, 256), row(0.5, 0.5, 0.5, 0, 0, 0)
    settings = dataclasses.replace(PLAIN, kl_beta=0.1)
    given = (
        train,
        old,
        reference_,
        sampler,
        entropies,
        np.ones((1, 1), np.float32),
        weights,
        row(1, 1, 1, 1, 1, 0) > 0,
    )
    _, sums = grpo_loss(*given, settings)
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
    _, sums = grpo_loss(
        zeros,
        zeros,
        None,
        sampler,
        zeros,
        np.ones((1, 1), np.float32),
        zeros + 1,
        zeros == 0,
        PLAIN,
    )
    assert float(sums.mismatch_outside) == 2


def test_sums_add_up_and_the_largest_mismatch_stays_the_largest() -> None:
    first, second = LossSums(*map(float, range(10))), LossSums(*map(float, range(10, 20)))
    assert first.add(second) == LossSums(10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 19.0)
    assert second.add(first).mismatch_max == 19.0


def test_the_loss_refuses_arrays_of_different_shapes() -> None:
    with pytest.raises(AssertionError):
        dataclasses.replace(golden(), old=np.zeros((1, 2, 3), np.float32)).run(PLAIN)
