"""The optimizer: warm-up, clipping and weight decay, against changes worked out by hand."""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import pytest

from jaxgrpo.config.settings import OptimizerSettings
from jaxgrpo.learner.update import make_optimizer


def stepped(settings: OptimizerSettings, gradients: Sequence[float]) -> list[float]:
    """One weight, from 0: its change at each step."""
    optimizer = make_optimizer(settings)
    weight = jnp.zeros(1)
    state = optimizer.init(weight)
    changes = []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.array([gradient]), state, weight)
        changes.append(float(updates[0]))
    return changes


def test_the_warm_up_rises_in_equal_steps_and_then_stays() -> None:
    # of a constant gradient Adam makes 1, so that each change is minus the learning rate
    changes = stepped(
        OptimizerSettings(learning_rate=0.4, warmup_steps=4, max_grad_norm=100.0), [1.0] * 6
    )
    assert changes == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.4, -0.4], rel=3e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_without_a_warm_up_the_first_step_has_the_whole_learning_rate(warmup_steps: int) -> None:
    changes = stepped(
        OptimizerSettings(learning_rate=0.4, warmup_steps=warmup_steps, max_grad_norm=100.0),
        [1.0] * 2,
    )
    assert changes == pytest.approx([-0.4, -0.4], rel=3e-6)


def test_a_warm_up_of_two_steps() -> None:
    changes = stepped(
        OptimizerSettings(learning_rate=0.4, warmup_steps=2, max_grad_norm=100.0), [1.0] * 3
    )
    assert changes == pytest.approx([-0.2, -0.4, -0.4], rel=3e-6)


def test_clipping_scales_the_gradient_down_to_the_norm() -> None:
    # epsilon 1 makes the size of the gradient visible: 3, 4 has norm 5; clipped to 1 it is .6, .8, and g / (g + 1) = .375, .44444
    optimizer = make_optimizer(
        OptimizerSettings(learning_rate=1.0, warmup_steps=1, epsilon=1.0, max_grad_norm=1.0)
    )
    weights = jnp.zeros(2)
    updates, _ = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(weights), weights)
    chex.assert_trees_all_close(updates, jnp.array([-0.375, -0.4444444]), rtol=2e-6)


def test_a_gradient_below_the_norm_is_not_clipped() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=1, epsilon=1.0, max_grad_norm=10.0)
    assert stepped(settings, [3.0]) == pytest.approx([-0.75], rel=2e-6)  # 3 / (3 + 1)


def test_weight_decay_is_taken_off_the_weights_and_not_put_into_the_gradient() -> None:
    optimizer = make_optimizer(
        OptimizerSettings(learning_rate=0.5, warmup_steps=1, weight_decay=0.1)
    )
    weights = jnp.array([2.0])
    updates, _ = optimizer.update(jnp.zeros(1), optimizer.init(weights), weights)
    assert float(updates[0]) == pytest.approx(-0.1, rel=1e-6)  # .5 * .1 * 2
